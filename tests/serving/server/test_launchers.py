"""The commands ``tritonserver`` and ``perf_analyzer`` as launchers in the environment's bin, which is on PATH."""

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from llamarec_client.recommender import RecommenderClient
from serving.server.launchers import PROGRAMS, write_launchers
from serving.server.programs import free_ports, is_launcher


@pytest.fixture
def launchers(tmp_path, monkeypatch) -> Path:
    """Write both launchers into a folder that is first on PATH, and return it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", os.pathsep.join([str(folder), "/usr/bin", "/bin"]))
    assert [path.name for path in write_launchers(folder)] == list(PROGRAMS)
    return folder


def program(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)
    return folder / name


@pytest.mark.thorough
def test_the_literal_commands_work_together(launchers, echo_repository, tmp_path):
    """In any folder, `tritonserver --model-repository ...` serves and `perf_analyzer -m llamarec ...` measures."""
    grpc, http, metrics = free_ports(3)
    ports = ["--grpc-port", str(grpc), f"--http-port={http}", f"--metrics-port={metrics}"]
    data = tmp_path / "data.json"
    data.write_text('{"data": [{"HISTORY": {"content": ["a", "b"], "shape": [2]}}]}')
    shutil.copytree(echo_repository, tmp_path / "model_repository")
    log = (tmp_path / "log").open("w+")
    server = subprocess.Popen(
        ["tritonserver", "--model-repository", "model_repository", *ports], cwd=tmp_path, stderr=log, stdout=log
    )
    try:
        while b"Started Metrics" not in (tmp_path / "log").read_bytes():
            assert server.poll() is None, (tmp_path / "log").read_text()
        with RecommenderClient(f"127.0.0.1:{grpc}") as recommender:
            assert recommender.recommend(["a"])[0].item_id == "a"
        measure = ["perf_analyzer", "-m", "llamarec", "-u", f"127.0.0.1:{http}", "--input-data", data]
        run = subprocess.run(
            [*measure, "--request-count", "5"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stdout + run.stderr
        assert "Throughput" in run.stdout
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(40) == 0
        log.close()


def test_writing_again_changes_nothing(launchers):
    """Set-up may run again after an upgrade: an existing launcher is not mistaken for the real program on PATH."""
    before = {path.name: path.read_bytes() for path in launchers.iterdir()}
    write_launchers(launchers)
    assert {path.name: path.read_bytes() for path in launchers.iterdir()} == before


def test_pips_own_file_is_replaced_as_a_whole(launchers):
    """Reinstalling with pip replaces a launcher by the raw binary; set-up then writes the launcher again."""
    raw = launchers / "perf_analyzer"
    raw.write_bytes(b"\x7fELF" + bytes(1000))
    assert not is_launcher(raw)
    write_launchers(launchers)
    assert is_launcher(raw)
    assert os.access(raw, os.X_OK)


def test_nothing_is_shadowed_where_the_programs_exist(tmp_path, monkeypatch):
    """No launcher is written if the programs are already on PATH, as in NVIDIA's container."""
    for name in PROGRAMS:
        program(tmp_path / "container", name, "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path / "container"))
    (tmp_path / "bin").mkdir()
    assert write_launchers(tmp_path / "bin") == []
    assert not list((tmp_path / "bin").iterdir())


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_launcher_hands_over_to_a_program_installed_later(launchers, tmp_path, monkeypatch, name):
    """A launcher runs a program installed later, even if the launcher is first on PATH.

    Arguments, quotes and the exit code pass through.
    """
    program(tmp_path / "container", name, 'printf "%s|" "$@"; exit 7')
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:{tmp_path / 'container'}")
    run = subprocess.run([name, "a b", "it's"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (7, "a b|it's|")


def test_launchers_of_two_environments_do_not_call_each_other(launchers, tmp_path, monkeypatch):
    """With two environments on PATH, the first launcher starts its own program, instead of a loop of two launchers."""
    shutil.copytree(launchers, tmp_path / "other")
    monkeypatch.setenv("PATH", f"{launchers}:{tmp_path / 'other'}:/usr/bin:/bin")
    run = subprocess.run(["perf_analyzer", "--version"], capture_output=True, text=True, timeout=20, check=False)
    assert "Perf Analyzer Version" in run.stderr


def test_modules_in_the_working_directory_are_not_imported(launchers, tmp_path):
    """A package ``serving`` in the working directory is not imported instead of this project's."""
    (tmp_path / "serving").mkdir()
    (tmp_path / "serving" / "__init__.py").write_text("raise RuntimeError")
    run = subprocess.run(["perf_analyzer", "--version"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "Perf Analyzer Version" in run.stderr


def test_bad_input_is_one_sentence_and_exit_code_2(launchers, echo_repository):
    """A port in use is reported in one line of standard error, with exit code 2."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        run = subprocess.run(
            ["tritonserver", "--model-repository", echo_repository, "--http-port", port],
            capture_output=True,
            text=True,
            check=False,
        )
    assert run.returncode == 2
    assert run.stderr.startswith("tritonserver: port ")
    assert port in run.stderr
    assert run.stderr.count("\n") == 1
