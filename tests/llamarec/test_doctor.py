"""`llamarec doctor`: each finding from facts given by the test, and the command on the real machine."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import types
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest

import llamarec.commands.doctor as module
from llamarec.commands.doctor import Finding, examine, print_findings

VersionInfo = namedtuple("VersionInfo", "major minor micro")
GIB = 2**30


@pytest.fixture(autouse=True)
def facts(monkeypatch, tmp_path) -> types.SimpleNamespace:
    """A machine without GPU, container limits and proxies, whose files the test writes."""
    for name in ("CPU_FLAGS", "MEMORY", "CGROUP", "DRIVER", "GPUS", "CONSTRAINTS"):
        monkeypatch.setattr(module, name, tmp_path / name.lower())
    for name in (*module.PROXY_VARIABLES, *module.NO_PROXY_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "memory").write_text("MemTotal:       16777216 kB\nMemFree:  1 kB\nMemAvailable:    8388608 kB\n")
    (tmp_path / "cpu_flags").write_text("flags\t\t: fpu avx512_bf16\n")
    (tmp_path / "cgroup").mkdir()
    return types.SimpleNamespace(folder=tmp_path)


def only(findings) -> Finding:
    (finding,) = findings
    return finding


# --- Python and the processor


@pytest.mark.parametrize(
    ("version", "level", "remedy"),
    [
        ((3, 9, 1), "prevents", "3.10 to 3.12"),
        ((3, 10, 1), "ok", "^$"),
        ((3, 11, 1), "ok", "^$"),
        ((3, 12, 1), "hurts", "NVTabular has no wheels"),
        ((3, 13, 1), "prevents", "3.10 to 3.12"),
    ],
)
def test_which_python_is_supported(monkeypatch, version, level, remedy):
    """As in pyproject.toml: Python 3.10 to 3.12, and merlin and NVTabular below 3.12."""
    monkeypatch.setattr(sys, "version_info", VersionInfo(*version))
    finding = only(module._python())
    assert finding.level == level
    assert re.search(remedy, finding.remedy)


def test_the_supported_versions_are_those_of_the_metadata():
    """pyproject.toml is the source of both."""
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    assert 'requires-python = ">=3.10,<3.13"' in text
    assert module.SERVED == ((3, 10), (3, 12))
    assert "nvtabular==23.8.0; python_version < '3.12'" in text
    assert module.PREPROCESSED[1] == (3, 11)


def test_another_system_is_said_first(monkeypatch):
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert only(module._python()).level == "prevents"


@pytest.mark.parametrize(
    ("affinity", "quota", "found", "level"),
    [
        ({0, 1}, "max 100000", "2", "ok"),
        ({0}, "", "1", "hurts"),
        ({0, 1, 2, 3}, "150000 100000", "1.5", "hurts"),
        ({0, 1}, "800000 100000", "2", "ok"),
    ],
)
def test_cores_are_those_that_may_be_used(monkeypatch, facts, affinity, quota, found, level):
    """By hand: the process's affinity, or the container's quota over its period (cgroup v2) where that is less."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: affinity)
    (facts.folder / "cgroup" / "cpu.max").write_text(quota)
    cores = next(module._processor())
    assert (cores.found, cores.level) == (found, level)


def test_bf16_is_a_flag_of_the_processor(monkeypatch):
    for native, level in ((True, "ok"), (False, "hurts")):
        monkeypatch.setattr("models.device.processor_has_bf16", lambda native=native: native)
        assert list(module._processor())[1].level == level


def test_without_the_file_of_flags_bf16_is_unknown(facts):
    (facts.folder / "cpu_flags").unlink()
    assert list(module._processor())[1].found.startswith("unknown")


def test_memory_is_what_is_left(facts):
    """8 of 16 GiB are available; a container with a limit of 4 GiB that uses 3 has 1 left, which is little."""
    assert only(module._memory()) == Finding("memory", "8.0 of 16.0 GiB free")
    (facts.folder / "cgroup" / "memory.max").write_text(f"{4 * GIB}\n")
    (facts.folder / "cgroup" / "memory.current").write_text(f"{3 * GIB}\n")
    finding = only(module._memory())
    assert (finding.found, finding.level) == ("1.0 of 4.0 GiB free", "hurts")
    (facts.folder / "memory").unlink()
    assert only(module._memory()).found.startswith("unknown")


# --- GPU


def gpu(facts, kernel: str = "Open Kernel Module for x86_64  550.54.15  Release") -> None:
    (facts.folder / "driver").write_text(f"NVRM version: NVIDIA UNIX {kernel}\nGCC version: 12\n")
    (facts.folder / "gpus" / "0000:01:00.0").mkdir(parents=True)
    (facts.folder / "gpus" / "0000:01:00.0" / "information").write_text("Model: \t\t NVIDIA H100 80GB\nIRQ: 1\n")


@pytest.mark.parametrize(
    "kernel", ["Open Kernel Module for x86_64  550.54.15  Release", "x86_64 Kernel Module  550.54.15  Thu"]
)
@pytest.mark.parametrize(
    ("cuda", "seen", "level", "remedy"),
    [
        ("12.8", True, "ok", "^$"),
        ("12.8", False, "hurts", "driver to one for CUDA 12.8"),
        ("", False, "hurts", "install a CUDA build"),
        (None, False, "ok", "^$"),
    ],
)
def test_a_gpu_is_of_use_if_pytorch_can_use_it(monkeypatch, facts, kernel, cuda, seen, level, remedy):
    """Both forms of the driver's version file, as NVIDIA's proprietary and open modules write it."""
    gpu(facts, kernel)
    monkeypatch.setattr(module, "_cuda_of_torch", lambda: cuda)
    monkeypatch.setattr(module, "_torch_sees_a_gpu", lambda: seen)
    finding = only(module._gpu())
    assert finding.found.startswith("NVIDIA H100 80GB; driver 550.54.15")
    assert finding.level == level
    assert re.search(remedy, finding.remedy)


def test_no_gpu_is_no_fault(monkeypatch):
    """The embedded model needs none; PyTorch's build is said all the same, where there is one."""
    monkeypatch.setattr(module, "_cuda_of_torch", lambda: None)
    assert only(module._gpu()) == Finding("GPU", "no NVIDIA driver")


def test_the_build_of_pytorch_is_read_from_its_file(monkeypatch, tmp_path):
    """The version is read from PyTorch's own ``version.py``: with CUDA, without it, and without PyTorch."""
    for text, cuda in (("cuda: Optional[str] = '12.8'\nhip = '6'", "12.8"), ("cuda: Optional[str] = None", "")):
        (tmp_path / "version.py").write_text(f"__version__ = '2.9'\n{text}\n")
        spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
        monkeypatch.setattr(module.util, "find_spec", lambda name, spec=spec: spec)
        assert module._cuda_of_torch() == cuda
    monkeypatch.setattr(module.util, "find_spec", lambda name: None)
    assert module._cuda_of_torch() is None


# --- packages


@pytest.fixture
def installed(monkeypatch) -> dict[str, str]:
    """Versions of the installed packages; the project requires what the list says."""
    versions = {"llamarec": "0.1.0", "numpy": "1.26.4", "rich": "15.0", "torch": "2.9+cpu", "nvtabular": "23.8.0"}
    required = [
        "numpy<2,>=1.26",
        "rich>=13",
        'torch>=2.6; extra == "serve"',
        'llamarec[serve]; extra == "train"',
        'nvtabular==23.8.0; python_version < "3.14" and extra == "train"',
        'cudf==1; python_version < "3.9" and extra == "train"',
    ]

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda name: required)
    return versions


def test_a_complete_installation(installed):
    """A marker that does not apply, here an old Python's, asks for nothing."""
    assert [finding.level for finding in module._packages()] == ["ok"]


@pytest.mark.parametrize(
    ("change", "name", "found", "level"),
    [
        ({"numpy": "2.0"}, "llamarec", "numpy 2.0 (needs <2,>=1.26)", "prevents"),
        ({"rich": None}, "llamarec", "rich (missing)", "prevents"),
        ({"torch": None}, "llamarec[serve]", "torch (missing)", "prevents"),
        ({"nvtabular": None}, "llamarec[train]", "nvtabular (missing)", "hurts"),
        ({"nvtabular": "24.0"}, "llamarec[train]", "nvtabular 24.0 (needs ==23.8.0)", "hurts"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_named_with_its_part(installed, change, name, found, level):
    """By hand, from the list of requirements above; what prevents is what every stage needs."""
    for package, version in change.items():
        if version is None:
            del installed[package]
        else:
            installed[package] = version
    bad = [finding for finding in module._packages() if finding.level != "ok"]
    assert [(finding.name, finding.found, finding.level) for finding in bad] == [(name, found, level)]
    assert "pip install" in bad[0].remedy


def test_the_project_itself_may_be_missing(installed):
    del installed["llamarec"]
    assert only(module._packages()).level == "prevents"


def test_versions_are_compared_with_the_tested_ones(installed, facts):
    """PyTorch's ``+cpu`` is the same version (PEP 440); a package that is not installed is not compared."""
    path = facts.folder / "constraints"
    path.write_text("# tested\nnumpy==1.26.4\ntorch==2.9\nrich==15.0\nabsent==1\n")
    assert only(module._tested_versions()).found == "all 3 as in constraints"
    installed["rich"] = "15.1"
    finding = only(module._tested_versions())
    assert finding.found == "1 of 3 differ: rich 15.1 (==15.0)"
    assert (finding.level, "make setup" in finding.remedy) == ("hurts", True)
    path.unlink()
    assert list(module._tested_versions()) == []


# --- the server


def test_a_server_on_the_path_has_a_version_file(monkeypatch, tmp_path):
    """NVIDIA's container has /opt/tritonserver/bin/tritonserver and /opt/tritonserver/TRITON_VERSION."""
    (tmp_path / "TRITON_VERSION").write_text("2.51.0\n")
    monkeypatch.setattr("serving.server.programs.program_on_path", lambda name: tmp_path / "bin" / name)
    assert only(module._tritonserver()).found.endswith("tritonserver, version 2.51.0")
    (tmp_path / "TRITON_VERSION").unlink()
    assert only(module._tritonserver()).found.endswith("version unknown")


def test_the_wheels_server_needs_a_stub_for_this_python(monkeypatch, tmp_path, installed):
    installed["nvidia-pytriton"] = "0.7.0"
    monkeypatch.setattr("serving.server.programs.program_on_path", lambda name: None)
    monkeypatch.setattr("serving.server.programs.wheel_folder", lambda: tmp_path)
    assert only(module._tritonserver()).level == "prevents"
    number = ".".join(map(str, sys.version_info[:2]))
    (tmp_path / "pytriton" / "tritonserver" / "python_backend_stubs" / number).mkdir(parents=True)
    assert only(module._tritonserver()) == Finding("tritonserver", "of nvidia-pytriton 0.7.0")


def test_no_server_prevents_serving(monkeypatch):
    monkeypatch.setattr("serving.server.programs.program_on_path", lambda name: None)
    monkeypatch.setattr("serving.server.programs.wheel_folder", lambda: None)
    finding = only(module._tritonserver())
    assert (finding.found, finding.level) == ("none", "prevents")
    assert "pip install 'llamarec[server]'" in finding.remedy


# --- folders, disk, proxies, ports


def test_a_folder_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    """One that is not there yet counts by the first folder above it; a file in its place is no folder."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "locked")
    (tmp_path / "locked").mkdir()
    (tmp_path / "file").touch()
    folders = {"new": tmp_path / "a" / "b", "locked": tmp_path / "locked" / "c", "file": tmp_path / "file" / "d"}
    levels = {finding.name: finding.level for finding in module._folders(folders)}
    assert levels == {"new": "ok", "locked": "hurts", "file": "hurts", "temporary folder": "ok"}


def test_no_temporary_folder_prevents_everything(monkeypatch):
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    assert only(module._folders({})).level == "prevents"


def test_little_room_hurts(monkeypatch, tmp_path):
    """3 GiB on the disk and 128 MiB of shared memory are the least; Docker's default for the latter is 64 MiB."""
    for free, levels in ((3 * GIB, ["ok", "ok"]), (GIB, ["hurts", "ok"]), (64 * 2**20, ["hurts", "hurts"])):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: types.SimpleNamespace(free=free))
        assert [finding.level for finding in module._disk(tmp_path / "new")] == levels
    assert "--shm-size" in list(module._disk(tmp_path))[1].remedy


def test_a_proxy_is_named_and_its_password_is_not(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://user:secret@proxy:3128")
    monkeypatch.setenv("no_proxy", "example.com")
    finding = only(module._proxies())
    assert (finding.found, finding.level) == ("http_proxy; no_proxy=example.com", "hurts")
    assert "secret" not in str(finding)
    monkeypatch.delenv("http_proxy")
    assert only(module._proxies()).level == "ok"


def test_a_taken_port_is_named_with_its_flag(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr("serving.server.programs.PORTS", {"grpc": port})
        finding = only(module._ports())
        assert (finding.found, finding.level) == (f"{port} in use", "hurts")
        assert "--grpc-port N" in finding.remedy
    assert only(module._ports()).level == "ok"


# --- the command


def test_the_table_marks_and_the_lines_say_the_remedies(capsys, monkeypatch):
    """Neither brackets nor long lines of a remedy are lost on a narrow terminal."""
    long = "x" * 200
    print_findings(
        [Finding("a", "fine"), Finding("b", "bad", "hurts", f"[serve] {long}"), Finding("c", "", "prevents", "do")]
    )
    out = capsys.readouterr().out
    assert f"  b: [serve] {long}\n" in out
    assert out.index("!! prevents running") < out.index("! will hurt")
    print_findings([Finding("a", "fine")])
    assert "Nothing hurts." in capsys.readouterr().out


def test_on_this_machine(monkeypatch, tmp_path):
    """The real facts: this environment runs the project, so nothing prevents it, and no stage's package was loaded."""
    monkeypatch.undo()
    program = (
        "import sys; sys.argv[1:] = ['doctor', '--json']\n"
        "from llamarec.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'pandas', 'tritonclient', 'merlin'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    report, _, loaded = run.stdout.rpartition("}")
    assert loaded.strip() == "[]", run.stderr
    report = json.loads(report + "}")
    assert report["runs"]
    findings = {finding["name"]: finding for finding in report["findings"]}
    assert findings["Python"]["found"].startswith(sys.version.split()[0])
    assert findings["cores"]["level"] == "ok" or os.cpu_count() == 1
    assert all(finding["remedy"] for finding in report["findings"] if finding["level"] != "ok")


@pytest.mark.parametrize(("level", "code"), [("ok", 0), ("hurts", 0), ("prevents", 1)])
def test_the_exit_code_says_whether_it_runs(monkeypatch, capsys, level, code):
    from llamarec.cli import main

    monkeypatch.setattr(module, "examine", lambda artifacts, repository: [Finding("a", "b", level, "c")])
    monkeypatch.setattr(sys, "argv", ["llamarec", "doctor", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    assert json.loads(capsys.readouterr().out)["runs"] == (code == 0)


def test_every_finding_is_made(tmp_path):
    """The order of the table, and no check that raises on a machine with little to read."""
    names = [finding.name for finding in examine(tmp_path / "artifacts", tmp_path / "repository")]
    assert names[:4] == ["Python", "cores", "bf16", "memory"]
    assert {"GPU", "tritonserver", "artifacts", "model repository", "disk", "proxies", "ports"} <= set(names)
