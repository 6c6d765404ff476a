"""Thin launchers: with the environment's ``bin`` on PATH, plain ``tritonserver`` and ``perf_analyzer`` work.

``python -m client.launchers BIN`` writes them into that folder. Where another program of the name is on PATH, as in
NVIDIA's container, none is written, and one written earlier hands over to that program.
"""

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from client.errors import BenchmarkError, ClientError
from client.server import (
    LAUNCHER_MARK,
    exec_server,
    execute,
    links_folder,
    own_programs,
    prepended,
    program_on_path,
    wheel_folder,
)

PROGRAMS = ("tritonserver", "perf_analyzer")


def perf_analyzer() -> tuple[Path, Mapping[str, str]]:
    """The perf_analyzer to run and its environment: the one on PATH, or else the tritonclient wheel's.

    The wheel installs one binary as both ``perf_analyzer`` and ``perf_client``; the launcher takes the first
    name. Two libraries that it needs lie in the nvidia-pytriton wheel under names with a hash.

    Raises:
        BenchmarkError: there is none.
    """
    if program := program_on_path("perf_analyzer"):
        return program, os.environ
    program = own_programs() / "perf_client"
    if not program.is_file():
        raise BenchmarkError("no perf_analyzer is installed: `pip install tritonclient==2.50.0` brings one")
    wheel = wheel_folder()
    if wheel is None:
        return program, os.environ
    needed = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}
    libraries = wheel / "nvidia_pytriton.libs"
    targets = {name: library for name, pattern in needed.items() for library in libraries.glob(pattern)}
    return program, {**os.environ, **prepended("LD_LIBRARY_PATH", str(links_folder("lib", targets)))}


def launch(name: str) -> NoReturn:
    """Becomes the program ``name`` with this process's arguments; what the launchers call."""
    try:
        if name == "tritonserver":
            exec_server(sys.argv[1:])
        program, environment = perf_analyzer()
        execute([str(program), *sys.argv[1:]], environment)
    except ClientError as error:
        sys.stderr.write(f"{name}: {error}\n")
        sys.exit(2)


def write_launchers(folder: Path) -> list[Path]:
    """Writes a launcher for each program that nothing else on PATH provides.

    A launcher is renamed over what pip installed under its name; installing again puts pip's file back.

    Returns:
        The launchers written.
    """
    written = []
    for name in PROGRAMS:
        if program_on_path(name, outside=folder):
            continue
        # -I: neither the working directory nor PYTHONPATH may stand in for the installed packages.
        call = f"from {LAUNCHER_MARK} import launch; launch({name!r})"
        aside = folder / f".{name}.{os.getpid()}"
        aside.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -I -c "{call}" "$@"\n', encoding="utf-8")
        aside.chmod(0o755)
        written.append(aside.replace(folder / name))
    return written


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python -m client.launchers BIN   (the environment's bin folder)")
    for launcher in write_launchers(Path(sys.argv[1])):
        print(launcher)
