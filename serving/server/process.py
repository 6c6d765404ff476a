"""Runs tritonserver as a child process: starts it, lists the processes of its Python models, stops it and cleans up."""

import ctypes
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Stub:
    """Process of one instance of a Python model."""

    pid: int
    model: str
    instance: str


def _end_with_parent() -> None:
    """Have the kernel stop the server when its parent process dies without stopping it."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class ServerProcess:
    """A tritonserver in a session of its own, so that Ctrl-C reaches only this process, which can stop it cleanly.

    The kernel also stops the server when the thread that started it ends, so start it in a thread that outlives it.

    Args:
        command: see :func:`serving.server.programs.server_command`.
        environment: see :func:`serving.server.programs.server_environment`.
        prefix: prefix of the names of its shared memory segments.
        output: file for its log. Default: this process's standard output and error.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        prefix: str,
        output: IO[bytes] | None = None,
    ) -> None:
        self._prefix = prefix
        self._process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            start_new_session=True,
            preexec_fn=_end_with_parent,  # noqa: PLW1509 - takes no lock
        )

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """Return the server's exit code; None while it runs."""
        return self._process.poll()

    def stubs(self) -> list[Stub]:
        """Return the running processes of the server's Python models."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, ValueError, IndexError):
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                if int(parent) == self.pid and state != "Z":
                    words = (folder / "cmdline").read_bytes().decode().split("\0")
                    programs = [word for word in words if word.endswith("/model.py")]
                    # A child that has not yet executed the stub still has the server's own command line.
                    if programs:
                        # .../<model>/<version>/model.py PREFIX .. <instance> DEFAULT
                        found.append(Stub(int(folder.name), Path(programs[0]).parts[-3], words[-3]))
        return found

    def stop(self, seconds: float) -> int:
        """Stop the server and its stubs, remove its shared memory, and return the server's exit code.

        A server that has not exited after ``seconds`` is killed.
        """
        try:
            if self._process.poll() is None:
                self._process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(seconds)
        finally:
            with suppress(ProcessLookupError):  # stubs included: a hanging stub outlives its server
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
            for segment in SHARED_MEMORY.glob(f"{self._prefix}*"):
                segment.unlink(missing_ok=True)
        return self._process.returncode


def is_alive(pid: int) -> bool:
    """Return whether a process exists and has not ended; a zombie has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
