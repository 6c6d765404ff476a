"""A tritonserver as a child process: started, stopped and cleaned up after, its Python processes told by name."""

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
    """The process of one instance of a Python model."""

    pid: int
    model: str
    instance: str


def _end_with_parent() -> None:
    """Has the kernel stop the server when the process that started it dies without stopping it."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class ServerProcess:
    """A server in a session of its own: an interrupt at the terminal reaches us, and we stop the server in order.

    The kernel also stops it when the thread that started it ends, so start it in one that stays.

    Args:
        command: see :func:`serving.server.programs.server_command`.
        environment: see :func:`serving.server.programs.server_environment`.
        prefix: of its shared memory.
        output: where it logs; the caller's own standard output and error when not given.
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
        """The server's process id."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def stubs(self) -> list[Stub]:
        """The living processes of its Python models."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, ValueError, IndexError):
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                if int(parent) == self.pid and state != "Z":
                    words = (folder / "cmdline").read_bytes().decode().split("\0")
                    programs = [word for word in words if word.endswith("/model.py")]
                    # A child that has not become a stub yet still has the server's own command line.
                    if programs:
                        # .../<model>/<version>/model.py PREFIX .. <instance> DEFAULT
                        found.append(Stub(int(folder.name), Path(programs[0]).parts[-3], words[-3]))
        return found

    def stop(self, seconds: float) -> int:
        """Asks it to exit, kills what has not exited in time, and removes its shared memory; its exit code."""
        try:
            if self._process.poll() is None:
                self._process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(seconds)
        finally:
            with suppress(ProcessLookupError):  # the stubs too: one that hangs outlives its server
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
            for segment in SHARED_MEMORY.glob(f"{self._prefix}*"):
                segment.unlink(missing_ok=True)
        return self._process.returncode


def is_alive(pid: int) -> bool:
    """Whether a process exists and has not ended; one that its parent did not collect has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
