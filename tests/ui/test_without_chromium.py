"""`make test-ui` on a machine without Chromium."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.thorough
def test_one_sentence_names_the_command_that_installs_it(tmp_path):
    """It was a traceback for each test, after the server had been started."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "ui", "tests/ui/test_page.py"]
    environment = {**os.environ, "PATH": str(tmp_path)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "not installed: run `make system-packages`" in run.stdout
    assert "Traceback" not in run.stdout + run.stderr
