"""Writes launcher scripts that put ``tritonserver`` and ``perf_analyzer`` into the environment's ``bin`` folder.

``python -m serving.server.launchers BIN`` writes them into that folder. If a program is elsewhere on PATH, as in
NVIDIA's container, no launcher is written for it, and a launcher that was written earlier starts that program.
"""

import shlex
import sys
from pathlib import Path
from typing import NoReturn

from preprocessing.artifacts import replacing
from serving.errors import ServingError
from serving.server.programs import LAUNCHER_MARK, exec_server, execute, perf_analyzer, program_on_path

PROGRAMS = ("tritonserver", "perf_analyzer")


def launch(name: str) -> NoReturn:
    """Replace this process with the program ``name``, called with the same arguments; the launchers call this."""
    try:
        if name == "tritonserver":
            exec_server(sys.argv[1:])
        program, environment = perf_analyzer()
        execute([str(program), *sys.argv[1:]], environment)
    except ServingError as error:
        sys.stderr.write(f"{name}: {error}\n")
        sys.exit(2)


def write_launchers(folder: Path) -> list[Path]:
    """Write a launcher for each program that no other folder on PATH provides.

    A launcher replaces the script that pip installed under the same name; installing again restores pip's script.

    Returns:
        The paths of the launchers that were written.
    """
    written = []
    for name in PROGRAMS:
        if program_on_path(name, outside=folder):
            continue
        # -I: modules in the working directory or on PYTHONPATH must not shadow the installed packages.
        call = f"from {LAUNCHER_MARK} import launch; launch({name!r})"
        with replacing(folder / name) as partial:
            partial.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -I -c "{call}" "$@"\n', encoding="utf-8")
            partial.chmod(0o755)
        written.append(folder / name)
    return written


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python -m serving.server.launchers BIN   (the environment's bin folder)")
    for launcher in write_launchers(Path(sys.argv[1])):
        print(launcher)
