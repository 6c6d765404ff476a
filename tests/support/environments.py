"""Fresh environments for tests of packages that cannot share the project's."""

import subprocess
import sys
from pathlib import Path

import uv


def fresh_environment(folder: Path, *installations: list[str]) -> Path:
    """Return the interpreter of a new environment, after `uv pip install` with each list of arguments."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    interpreter = folder / "bin" / "python"
    for arguments in installations:
        command = [uv.find_uv_bin(), "pip", "install", "--quiet", "--python", str(interpreter), *arguments]
        run = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
        assert run.returncode == 0, run.stdout + run.stderr
    return interpreter
