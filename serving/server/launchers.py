"""Thin launchers: with the environment's ``bin`` on PATH, plain ``tritonserver`` and ``perf_analyzer`` work.

``python -m serving.server.launchers BIN`` writes them into that folder. Where another program of the same name is on
PATH, as in NVIDIA's container, none is written, and one that was written earlier starts that program.
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
    """Becomes the program ``name`` with this process's arguments; what the launchers call."""
    try:
        if name == "tritonserver":
            exec_server(sys.argv[1:])
        program, environment = perf_analyzer()
        execute([str(program), *sys.argv[1:]], environment)
    except ServingError as error:
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
