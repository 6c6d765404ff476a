"""`llamarec demo` from start to end, as a new user runs it."""

import subprocess
import sys
from pathlib import Path

import pytest


def processes() -> set[str]:
    """Return process id and command line of every running tritonserver and its Python steps."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if "triton" in command and "pytest" not in command:
            found.add(f"{path.parent.name} {command}")
    return found


@pytest.mark.slow
def test_the_demo_ends_with_a_served_recommendation(tmp_path):
    """The demo takes seven minutes at first; a second run skips the finished stages and prints the same answer.

    No process and no shared memory remain.
    """
    command = [sys.executable, "-m", "llamarec.cli", "demo"]
    command += ["--artifacts", str(tmp_path / "artifacts"), "--repository", str(tmp_path / "repository")]
    processes_before, memory_before = processes(), set(Path("/dev/shm").iterdir())
    printed = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(2)]
    for run in printed:
        assert "what LlamaRec answers: the same 20, ranked by the language model" in run.stdout
        assert "The item this user really chose next" in run.stdout
    assert "validation Recall@10" in printed[0].stderr
    assert "validation Recall@10" not in printed[1].stderr
    assert printed[0].stdout == printed[1].stdout
    assert processes() == processes_before
    assert set(Path("/dev/shm").iterdir()) == memory_before
