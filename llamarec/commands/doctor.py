"""`llamarec doctor`: what this machine has, what of it will hurt, and the remedy.

Only measured facts are reported, and no package of the stages is imported for them, except PyTorch where a GPU is
there to be asked for.
"""

import os
import platform
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Literal

import typer

from llamarec.options import DEFAULT_ARTIFACTS, DEFAULT_REPOSITORY, Artifacts, Json, Repository
from llamarec.tables import console, print_json, print_table
from llamarec_client.address import NO_PROXY_VARIABLES, PROXY_VARIABLES

Level = Literal["ok", "hurts", "prevents"]
OWN = "llamarec"
CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
"""The tested versions; a checkout has the file, an installed package has not."""
CPU_FLAGS, MEMORY = Path("/proc/cpuinfo"), Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
"""Limits of the container, where there are any."""
DRIVER, GPUS = Path("/proc/driver/nvidia/version"), Path("/proc/driver/nvidia/gpus")
SHARED_MEMORY = Path("/dev/shm")
SERVED, PREPROCESSED = ((3, 10), (3, 12)), ((3, 10), (3, 11))
"""First and last Python version on which the project runs, and on which NVTabular has wheels."""
EXTRAS = {
    "serve": "every command but `recommend`",
    "train": "`preprocess`, `train-retriever`, `train-ranker`, `tune`, `export` and `demo`",
    "server": "a tritonserver where no NVIDIA container is",
    "openvino": "the faster ranker on a processor with bf16",
    "faiss": "`export --index`",
    "ui": "`demo --ui`",
}
"""What each of the optional parts is for. Only the first is part of every installation that runs a stage."""
GIB = 2**30
LITTLE_MEMORY, LITTLE_DISK, LITTLE_SHARED = 2 * GIB, 3 * GIB, 128 * 2**20
"""The embedded model has 0.5 GiB of weights in fp32, and a data set keeps them as base, as trained and as exported.
Docker's default of 64 MiB of shared memory is little for the tensors of four steps."""


@dataclass(frozen=True)
class Finding:
    """One fact about this machine."""

    name: str
    found: str
    level: Level = "ok"
    remedy: str = ""
    """What the fact leads to, and what to do about it; empty for what is all right."""


def doctor(
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    repository: Repository = DEFAULT_REPOSITORY,
    as_json: Json = False,
) -> None:
    """Show what this machine has, what of it will hurt, and the remedy. Exit code 1 if something prevents running."""
    findings = examine(artifacts, repository)
    prevented = any(finding.level == "prevents" for finding in findings)
    if as_json:
        print_json({"runs": not prevented, "findings": [asdict(finding) for finding in findings]})
    else:
        print_findings(findings)
    raise typer.Exit(1 if prevented else 0)


def print_findings(findings: list[Finding]) -> None:
    """Print a short table of what was found, and then the remedies."""
    marks = {"ok": "", "hurts": "!", "prevents": "!!"}
    print_table("", ["", "this machine", "found"], [[marks[f.level], f.name, f.found] for f in findings])
    for level, heading in (("prevents", "!! prevents running"), ("hurts", "! will hurt")):
        remedies = [f"{finding.name}: {finding.remedy}" for finding in findings if finding.level == level]
        for line in [heading, *(f"  {remedy}" for remedy in remedies)] if remedies else []:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    if all(finding.level == "ok" for finding in findings):
        console.print("Nothing hurts.")


def examine(artifacts: Path, repository: Path) -> list[Finding]:
    """Return everything that is known about this machine, in the order of the table."""
    return [
        *_python(),
        *_processor(),
        *_memory(),
        *_gpu(),
        *_packages(),
        *_tested_versions(),
        *_tritonserver(),
        *_folders({"artifacts": artifacts, "model repository": repository}),
        *_disk(artifacts),
        *_proxies(),
        *_ports(),
    ]


def _python() -> Iterator[Finding]:
    version = sys.version_info[:2]
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if platform.system() != "Linux":
        yield Finding("Python", found, "prevents", "training and serving run on Linux only: use a container or WSL 2")
    elif not SERVED[0] <= version <= SERVED[1]:
        yield Finding("Python", found, "prevents", "the project runs on Python 3.10 to 3.12: `make setup` with 3.11")
    elif version > PREPROCESSED[1]:
        remedy = "NVTabular has no wheels for it, so `preprocess` and `demo` do not run: use Python 3.11 for them"
        yield Finding("Python", found, "hurts", remedy)
    else:
        yield Finding("Python", found)


def _processor() -> Iterator[Finding]:
    from models.device import processor_has_bf16

    cores = float(len(os.sched_getaffinity(0)))
    quota = re.match(r"(\d+) (\d+)", _text(CGROUP / "cpu.max"))
    if quota:
        cores = min(cores, int(quota[1]) / int(quota[2]))
    few = "the server's steps and its clients compete for it: give it two cores"
    yield Finding("cores", f"{cores:g}", "hurts" if cores < 2 else "ok", few if cores < 2 else "")
    if not CPU_FLAGS.is_file():
        yield Finding("bf16", f"unknown, {CPU_FLAGS} is missing")
    elif processor_has_bf16():
        yield Finding("bf16", "yes, in the processor")
    else:
        remedy = (
            "training and ranking in fp32 take several times as long as on a processor with avx512_bf16 or amx_bf16"
        )
        yield Finding("bf16", "no, not in the processor", "hurts", remedy)


def _memory() -> Iterator[Finding]:
    numbers = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _text(MEMORY), re.MULTILINE))
    if not {"MemTotal", "MemAvailable"} <= numbers.keys():
        yield Finding("memory", f"unknown, {MEMORY} does not say")
        return
    total, free = (int(numbers[name]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit, used = (_text(CGROUP / name).strip() for name in ("memory.max", "memory.current"))
    if limit.isdecimal() and used.isdecimal():  # otherwise "max", or no container
        total, free = min(total, int(limit)), min(free, int(limit) - int(used))
    yield _enough(
        "memory", free, f"{free / GIB:.1f} of {total / GIB:.1f} GiB free", LITTLE_MEMORY, "end other programs"
    )


def _gpu() -> Iterator[Finding]:
    cuda = _cuda_of_torch()
    build = "" if cuda is None else f"; PyTorch is a build {f'for CUDA {cuda}' if cuda else 'without CUDA'}"
    driver = re.search(r"Module(?: for \S+)?\s+([\d.]+)", _text(DRIVER))
    if driver is None:
        yield Finding("GPU", f"no NVIDIA driver{build}")
        return
    models = [re.search(r"Model:\s*(.+)", _text(path)) for path in sorted(GPUS.glob("*/information"))]
    found = f"{', '.join(model[1] for model in models if model) or 'none'}; driver {driver[1]}{build}"
    if cuda == "":
        yield Finding("GPU", found, "hurts", "PyTorch cannot use it: install a CUDA build of PyTorch")
    elif cuda and not _torch_sees_a_gpu():
        remedy = f"PyTorch cannot use it: give the container a GPU, or update the driver to one for CUDA {cuda}"
        yield Finding("GPU", found, "hurts", remedy)
    else:
        yield Finding("GPU", found)


def _cuda_of_torch() -> str | None:
    """Return the CUDA version that PyTorch was built for, empty for none; None where it is not installed.

    Reads a file, because importing PyTorch takes seconds.
    """
    spec = util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    match = re.search(r"^cuda\b[^=]*=\s*'([^']*)'", _text(Path(spec.submodule_search_locations[0], "version.py")), re.M)
    return match[1] if match else ""


def _torch_sees_a_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _packages() -> Iterator[Finding]:
    """Yield what each part of the project lacks, by the requirements in its own metadata."""
    if util.find_spec("packaging") is None:
        yield Finding("packages", "packaging (missing)", "prevents", "nothing can be compared: `pip install packaging`")
        return
    if _version(OWN) is None:
        yield Finding("packages", "llamarec is not installed", "prevents", "`pip install ./client .` in a checkout")
        return
    problems = {extra: _unmet(extra) for extra in ("", *EXTRAS)}
    for extra, unmet in problems.items():
        name = f"llamarec[{extra}]" if extra else OWN
        if not unmet:
            continue
        level: Level = "prevents" if extra in ("", "serve") else "hurts"
        needed = f"{EXTRAS[extra]} needs them" if extra else "every command needs them"
        yield Finding(name, ", ".join(unmet), level, f"{needed}: `pip install './client' '.[{extra or 'serve'}]'`")
    whole = [extra for extra, unmet in problems.items() if extra and not unmet]
    if not problems[""]:
        yield Finding("packages", f"complete for {', '.join(whole)}" if whole else "complete for no part")


def _unmet(extra: str) -> list[str]:
    """Return the requirements of an extra that are not met, the base's if it is empty: ``name (missing)``, for example.

    What an extra requires through another one of the project's is listed under that one only.
    """
    from packaging.requirements import Requirement

    unmet = []
    for requirement in map(Requirement, metadata.requires(OWN) or []):
        marker = requirement.marker
        applies = marker is None or marker.evaluate({"extra": extra})
        only_here = not extra or (marker is not None and not marker.evaluate({"extra": ""}))
        if requirement.name == OWN or not (applies and only_here):
            continue
        version = _version(requirement.name)
        if version is None:
            unmet.append(f"{requirement.name} (missing)")
        elif not requirement.specifier.contains(version, prereleases=True):
            unmet.append(f"{requirement.name} {version} (needs {requirement.specifier})")
    return unmet


def _tested_versions() -> Iterator[Finding]:
    """Yield the installed packages whose version differs from the one in ``constraints.txt``."""
    if not CONSTRAINTS.is_file() or util.find_spec("packaging") is None:
        return  # without a checkout, only the ranges of the metadata are known
    from packaging.requirements import Requirement

    lines = [
        line for line in _text(CONSTRAINTS).splitlines() if line.strip() and not line.lstrip().startswith(("#", "-"))
    ]
    installed = [(wanted, version) for wanted in map(Requirement, lines) if (version := _version(wanted.name))]
    others = [
        f"{wanted.name} {version} ({wanted.specifier})"
        for wanted, version in installed
        if not wanted.specifier.contains(version, prereleases=True)
    ]
    if others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        remedy = "these versions were not tested together: `make setup`, or pip install --constraint constraints.txt"
        yield Finding("tested versions", f"{len(others)} of {len(installed)} differ: {shown}", "hurts", remedy)
    else:
        yield Finding("tested versions", f"all {len(installed)} as in {CONSTRAINTS.name}")


def _tritonserver() -> Iterator[Finding]:
    from serving.server.programs import program_on_path, wheel_folder

    if program := program_on_path("tritonserver"):
        version = _text(program.parent.parent / "TRITON_VERSION").strip()
        yield Finding("tritonserver", f"{program}, version {version or 'unknown'}")
        return
    wheel = wheel_folder()
    if wheel is None:
        remedy = "`serve`, `demo` and `bench` need one: pip install 'llamarec[server]', or NVIDIA's Triton container"
        yield Finding("tritonserver", "none", "prevents", remedy)
        return
    found = f"of nvidia-pytriton {_version('nvidia-pytriton')}"
    stub = wheel / "pytriton/tritonserver/python_backend_stubs" / ".".join(map(str, sys.version_info[:2]))
    if stub.is_dir():
        yield Finding("tritonserver", found)
    else:
        yield Finding("tritonserver", found, "prevents", "it has no stub for this Python: use Python 3.10 to 3.12")


def _folders(folders: dict[str, Path]) -> Iterator[Finding]:
    for name, folder in folders.items():
        writable = _is_writable(folder)
        remedy = "" if writable else "nothing can be written into it: choose another folder, or change its permissions"
        yield Finding(name, f"{folder}{'' if writable else ', not writable'}", "ok" if writable else "hurts", remedy)
    try:
        yield Finding("temporary folder", tempfile.gettempdir())
    except FileNotFoundError:
        yield Finding("temporary folder", "none is writable", "prevents", "set TMPDIR to a folder that can be written")


def _is_writable(folder: Path) -> bool:
    """Return whether a folder, or the first folder above it that exists, can be written to."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _disk(artifacts: Path) -> Iterator[Finding]:
    existing = next(parent for parent in (artifacts.absolute(), *artifacts.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    yield _enough("disk", free, f"{free / GIB:.1f} GiB free", LITTLE_DISK, "make room, or name another --artifacts")
    if SHARED_MEMORY.is_dir():
        free = shutil.disk_usage(SHARED_MEMORY).free
        remedy = "`docker run --shm-size 1g`: Triton's steps exchange tensors through it"
        yield _enough("shared memory", free, f"{free / 2**20:,.0f} MiB free", LITTLE_SHARED, remedy)


def _enough(name: str, free: int, found: str, wanted: int, remedy: str) -> Finding:
    if free >= wanted:
        return Finding(name, found)
    return Finding(name, found, "hurts", f"less than {wanted / GIB:g} GiB is free: {remedy}")


def _proxies() -> Iterator[Finding]:
    used = [name for name in PROXY_VARIABLES if os.environ.get(name)]
    if not used:
        yield Finding("proxies", "none for gRPC")
        return
    excluded = next((f"; {name}={os.environ[name]}" for name in NO_PROXY_VARIABLES if os.environ.get(name)), "")
    remedy = f"gRPC reaches servers on other machines through the proxy of {used[0]}: add their hosts to no_proxy"
    yield Finding("proxies", ", ".join(used) + excluded, "hurts", remedy)  # no values: they may hold passwords


def _ports() -> Iterator[Finding]:
    from serving.server.programs import PORTS

    taken = {endpoint: port for endpoint, port in PORTS.items() if not _is_free(port)}
    if not taken:
        yield Finding("ports", f"{', '.join(map(str, sorted(PORTS.values())))} are free")
        return
    flags = " ".join(f"--{endpoint}-port N" for endpoint in taken)
    remedy = f"a server may run already; for a second one: `llamarec serve {flags}`"
    yield Finding("ports", f"{', '.join(map(str, sorted(taken.values())))} in use", "hurts", remedy)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignore a stopped server's TIME_WAIT
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _version(package: str) -> str | None:
    """Return the installed version of a package; None if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _text(path: Path) -> str:
    """Return the text of a file; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
