"""Starting and stopping the real tritonserver."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.config import REPOSITORY
from llamarec_client.recommender import RecommenderClient
from serving.errors import ServerFailure
from serving.server.local import LocalServer
from serving.server.process import SHARED_MEMORY, ServerProcess
from serving.server.programs import (
    check_ports,
    exec_server,
    free_ports,
    has_option,
    links_folder,
    program_on_path,
    served_path,
    server_command,
    server_environment,
)


def segments(server: LocalServer) -> list[Path]:
    return list(SHARED_MEMORY.glob(f"{server._prefix}*"))


def group_is_gone(group: int) -> bool:
    """Return whether no process of the group is alive; a server leads a process group that includes its stubs."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = path.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(process_group) == group and state != "Z":
            return False
    return True


def wait_for(condition, seconds: float = 15.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(condition())


def port_flags() -> list[str]:
    return [f"--{name}-port={port}" for name, port in zip(("grpc", "http", "metrics"), free_ports(3), strict=True)]


def answers(url: str) -> bool:
    host, port = url.split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


@pytest.mark.parametrize(
    "interruption",
    [None, *(pytest.param(error, marks=pytest.mark.thorough) for error in (KeyboardInterrupt, RuntimeError))],
)
def test_leaving_the_block_leaves_nothing_behind(echo_repository, tmp_path, interruption):
    """No process of the server's group and no shared memory with its prefix remains, however the block ends."""
    log = tmp_path / "server.log"
    with suppress(KeyboardInterrupt, RuntimeError), LocalServer(echo_repository, log=log) as server:
        pid = server.pid
        with RecommenderClient(server.url) as recommender:
            assert len(recommender.recommend(["a", "b"])) == 2
        assert len(segments(server)) == 7, "one segment for each Python step, for events and for items"
        if interruption:
            raise interruption
    assert group_is_gone(pid)
    assert not segments(server)
    assert "successfully unloaded 'ranker'" in log.read_text(), "stopped in order, not killed"


@pytest.mark.thorough
def test_a_proxy_does_not_keep_a_local_server_from_becoming_ready(echo_repository, monkeypatch):
    """By default gRPC asks the proxy of ``http_proxy`` for loopback addresses, too (grpc/grpc#29718, grpc/grpc#15942),
    so that demo and bench waited for two minutes and gave up. Nothing listens at this proxy.
    """
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_ports(1)[0]}")
    with LocalServer(echo_repository) as server, RecommenderClient(server.url) as recommender:
        assert len(recommender.recommend(["a", "b"])) == 2


@pytest.mark.thorough
def test_a_repository_is_served_whatever_the_name_of_its_folder(echo_repository, tmp_path, monkeypatch):
    """With a space in its path, Triton started each step again and again, with "stol" in its log
    (triton-inference-server/python_backend#404). The other characters mean something to the shell as well.
    """
    repository = shutil.copytree(echo_repository, tmp_path / "it's my $HOME (v2)" / "model repository")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with LocalServer(repository) as server, RecommenderClient(server.url) as recommender:
        assert len(recommender.recommend(["a", "b"])) == 2
    assert not list(tmp_path.glob("llamarec-*"))


def test_a_path_that_a_shell_takes_as_one_word_is_served_itself(tmp_path):
    """A link would hide from the log where the repository is."""
    with served_path(tmp_path / "models_v2.1-rc+1") as path:
        assert path == tmp_path / "models_v2.1-rc+1"


def test_a_link_is_a_whole_path_and_goes_with_the_block(tmp_path, monkeypatch):
    """The link leads to the repository from any working directory."""
    (tmp_path / "my models").mkdir()
    monkeypatch.chdir(tmp_path)
    with served_path(Path("my models")) as link:
        assert link.resolve() == (tmp_path / "my models").resolve()
        assert " " not in str(link)
    assert not link.parent.exists()
    assert (tmp_path / "my models").is_dir()


def test_a_temporary_folder_with_a_space_is_no_help(tmp_path, monkeypatch):
    """The remedy is the variable that chooses the folder."""
    folder = tmp_path / "my tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with pytest.raises(ServerFailure, match="set TMPDIR"), served_path(tmp_path / "my models"):
        pass


def test_the_launcher_refuses_what_it_cannot_serve(tmp_path):
    """It becomes the server, so nobody would remove a link; the sentence names the command that can."""
    for arguments in (["--model-repository", str(tmp_path / "my models")], [f"--model-store={tmp_path / 'a b'}"]):
        with pytest.raises(ServerFailure, match="llamarec serve"):
            exec_server(arguments)


def test_an_environment_with_a_space_in_its_path_links_elsewhere(tmp_path, monkeypatch):
    """The stub's path is part of the same line of shell, so the links to it move to the user's cache; where that has
    a space too, the sentence says what is needed.
    """
    target = tmp_path / "stub"
    target.touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "my checkout" / ".venv"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert links_folder("backends", {"stub": target}) == tmp_path / "home" / ".cache" / "llamarec" / "backends"
    monkeypatch.setenv("HOME", str(tmp_path / "my home"))
    with pytest.raises(ServerFailure, match="path without spaces"):
        links_folder("backends", {"stub": target})


def test_a_killed_server_is_cleaned_up_too(echo_repository):
    """The block removes the shared memory and the stubs of a server that SIGKILL prevented from doing so."""
    with LocalServer(echo_repository) as server:
        pid = server.pid
        os.kill(pid, signal.SIGKILL)
        assert segments(server)
    assert wait_for(lambda: group_is_gone(pid))
    assert not segments(server)


def test_only_what_runs_a_model_is_a_stub():
    """A stub is recognised by its command line; a child just forked, or one that runs another program, is no stub."""
    stub = f'{sys.executable} -c "import time; time.sleep(60)" /models/ranker/1/model.py prefix 1 2 ranker_0 DEFAULT'
    server = ServerProcess(["bash", "-c", f"sleep 60 & {stub} & wait"], os.environ, "no-such-prefix")
    try:
        assert wait_for(server.stubs)
        assert [(found.model, found.instance) for found in server.stubs()] == [("ranker", "ranker_0")]
    finally:
        server.stop(5)
    assert server.stubs() == []


@pytest.mark.thorough
def test_the_server_ends_with_the_process_that_started_it(echo_repository):
    """The server ends when its owner is killed, so that an interrupted demo or test leaves no server on the ports."""
    program = (
        "import sys, time; from pathlib import Path; from serving.server.local import LocalServer\n"
        "with LocalServer(Path(sys.argv[1])) as server: print(server.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, echo_repository], stdout=subprocess.PIPE, text=True) as owner:
        pid = int(owner.stdout.readline())
        assert not group_is_gone(pid)
        owner.kill()
    assert wait_for(lambda: group_is_gone(pid))


def test_a_taken_port_is_named_before_anything_starts(echo_repository, tmp_path):
    """A port in use is reported in one sentence with the port and its flag, before a log is written."""
    log = tmp_path / "server.log"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerFailure, match=f"port {port} is in use.*--http-port"):
            LocalServer(echo_repository, http_port=port, log=log).__enter__()
    assert not log.exists()


@pytest.mark.thorough
def test_missing_weights_are_explained_in_the_log(tmp_path):
    """For a fresh clone without weights, the error contains the log's advice to run the export, and nothing is left."""
    repository = shutil.copytree(REPOSITORY, tmp_path / "repository", ignore=shutil.ignore_patterns("artifact*"))
    server = LocalServer(repository)
    with pytest.raises(ServerFailure, match="run `llamarec export`") as raised, server:
        pass
    assert "exited with code 1" in str(raised.value)
    assert not segments(server)


def test_a_server_that_never_becomes_ready_is_given_up_with_its_log(echo_repository):
    """A server that is not ready within the time limit is stopped, and the error says so."""
    server = LocalServer(echo_repository, timeout=0.0)
    with pytest.raises(ServerFailure, match="not ready after 0 s"), server:
        pass
    assert not segments(server)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.thorough)])
def test_the_launcher_becomes_the_server_so_signals_pass_through(echo_repository, number):
    """The server replaces the `tritonserver` launcher in the same process, and exits with code 0 on a signal."""
    flags = port_flags()
    url = f"127.0.0.1:{flags[0].rpartition('=')[2]}"
    command = [
        sys.executable,
        "-c",
        "import sys; from serving.server.programs import exec_server as go; go(sys.argv[1:])",
    ]
    with subprocess.Popen(
        [*command, "--model-repository", echo_repository, *flags], stderr=subprocess.DEVNULL
    ) as server:
        try:
            assert wait_for(lambda: answers(url))
            assert os.readlink(f"/proc/{server.pid}/exe").endswith("/tritonserver")
            server.send_signal(number)
            assert server.wait(20) == 0
        finally:
            server.kill()


def test_exit_codes_pass_through():
    """For a flag that the server refuses, the launcher exits with the server's exit code 1."""
    command = [
        sys.executable,
        "-c",
        "import sys; from serving.server.programs import exec_server as go; go(sys.argv[1:])",
    ]
    run = subprocess.run([*command, *port_flags(), "--no-such-flag"], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "no-such-flag" in run.stderr


@pytest.mark.parametrize(
    "given_flags",
    [
        ["--http-address=0.0.0.0", "--backend-directory=/b", "--backend-config=python,shm-region-prefix-name=mine"],
        [
            "--http-address",
            "0.0.0.0",
            "--backend-directory",
            "/b",
            "--backend-config",
            "python,shm-region-prefix-name=mine",
        ],
    ],
)
def test_only_absent_flags_are_added(given_flags):
    """The caller's flags are kept in either notation, and only the remaining defaults are added."""
    command = server_command(given_flags)
    assert command[1 : 1 + len(given_flags)] == given_flags
    added = command[1 + len(given_flags) :]
    assert "--disable-auto-complete-config" in added
    assert not any("http-address" in flag or "backend-" in flag for flag in added)


@given(st.sampled_from(["--http-port", "--http-port-range"]), st.booleans(), st.lists(st.sampled_from(["x", "--y"])))
def test_an_option_is_recognised_whole(option, joined, others):
    """``--http-port-range`` is not mistaken for ``--http-port``, at any position and in either notation."""
    arguments = [*others, *([f"{option}=1"] if joined else [option, "1"])]
    assert has_option(arguments, "--http-port") == (option == "--http-port")


def test_a_server_on_the_path_is_taken_as_it_is(tmp_path, monkeypatch):
    """A tritonserver on PATH, as in NVIDIA's container, gets exactly the given arguments."""
    server = tmp_path / "tritonserver"
    server.write_text("#!/bin/sh\n")
    server.chmod(0o755)
    monkeypatch.setenv("PATH", f"{Path(sys.prefix) / 'bin'}:{tmp_path}")
    assert program_on_path("tritonserver") == server
    assert server_command(["--model-repository", "r"]) == [str(server), "--model-repository", "r"]


def test_without_any_server_the_remedy_is_named(tmp_path, monkeypatch):
    """If there is no server on PATH and no wheel, the error says what to install."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ServerFailure, match=r"pip install 'llamarec\[server\]'"):
        server_command([])


@pytest.mark.parametrize("off", ["--allow-http=false", "--reuse-http-port=true", "--help"])
def test_a_port_that_is_not_taken_from_others_is_not_checked(off):
    """A port is not checked if its endpoint is off, if it may be shared, or if only the help is requested."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        flags = [*port_flags(), f"--http-port={taken.getsockname()[1]}"]
        with pytest.raises(ServerFailure, match="in use"):
            check_ports(flags)
        check_ports([*flags, off])


def test_the_stubs_find_this_environment():
    """PATH starts with this environment's bin, because the Python backend uses the first ``python`` on PATH."""
    assert server_environment()["PATH"].split(os.pathsep)[0] == str(Path(sys.prefix) / "bin")
