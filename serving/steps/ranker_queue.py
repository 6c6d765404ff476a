"""The queue before the ranker: a full queue refuses at once, and a request that waited too long costs no pass.

Triton's own queue policies would limit the wait too, but with any of them the batcher of core 2.51 prepares no request
ahead, and sleeps up to half a second before it hands over the next one. Therefore ``prompt_builder`` counts the
requests it admits, and every process of the ranker records in a small file which of them it took last.
"""

import fcntl
import os
import re
import struct
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from llamarec_client.contract import TensorSpec
from preprocessing.errors import InputError
from serving.contract import PROBE, QUEUE_PARAMETER, QUEUED, SIZE_PARAMETER
from serving.layout import parameter

CANCELLATION_SECONDS = 0.02
"""Wait in seconds from which a request is asked whether it was cancelled: to ask the server takes up to half a
millisecond, and hardly a caller gives up that soon."""


PREFIX = "llamarec-queue-"
"""Start of the names of the folders in the temporary folder, before the process of the server."""


class GivenUpError(Exception):
    """The caller cancelled the request, or its deadline passed."""

    def __str__(self) -> str:
        return "the caller gave up"


class FullError(Exception):
    """The queue holds as many prompts as can be ranked in time."""


class LateError(Exception):
    """The request waited too long: more requests arrive than can be ranked."""


def now() -> int:
    """Return the time in microseconds, by the clock that all processes of this machine share."""
    return time.monotonic_ns() // 1000


def queue_folder(suffix: str) -> Path:
    """Return the folder in which the steps of one release in one server, their parent process, find each other's files.

    Folders of servers that were killed are removed.

    Raises:
        InputError: the folder belongs to another user of this machine.
    """
    temporary = Path(tempfile.gettempdir())
    for left in temporary.glob(f"{PREFIX}*"):
        # Other folders of this machine may start like these.
        server = re.fullmatch(rf"{PREFIX}(\d+).*", left.name)
        if server and not Path("/proc", server[1]).exists():
            tidy(left)
    folder = temporary / f"{PREFIX}{os.getppid()}{suffix}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise InputError(f"{folder} belongs to another user: remove it, or set TMPDIR to a folder of your own")
    return folder


class Admission:
    """The entrance to the queue, at ``prompt_builder``: admits as many requests as may wait."""

    def __init__(self, folder: Path, size: int, seconds: float) -> None:
        """Limit the queue.

        Args:
            folder: see :func:`queue_folder`.
            size: maximum number of waiting prompts.
            seconds: maximum wait, after which the ranker refuses a prompt.
        """
        self._folder = folder
        self._size = size
        self._microseconds = int(seconds * 1e6)
        self._admitted: deque[int] = deque()
        """Times at which the requests that may still wait were admitted, oldest first."""

    def admit(self, request: Any, tensors: Mapping[TensorSpec, NDArray[Any]]) -> None:
        """Admit a Triton request.

        Raises:
            FullError: the queue is full.
        """
        if request.request_id() == PROBE:  # health probes ask this step alone and never reach the ranker
            return
        if len(self._admitted) >= self._size:
            self._forget_finished()
        if len(self._admitted) >= self._size:
            raise FullError(f"queue full: {self._size} wait for the ranker, no more can be ranked in time")
        self._admitted.append(now())

    def close(self) -> None:
        """Remove the queue's files."""
        tidy(self._folder)

    def _forget_finished(self) -> None:
        """Forget the requests that a ranker took or refused by now; all of them when one of its processes is dead.

        The requests of a dead process are no longer waiting, and the next ones should learn that it is dead.
        """
        taken = [_last_taken(path) for path in self._folder.glob("[0-9]*")]
        if not taken or None in taken:
            self._admitted.clear()
        gone = max([now() - self._microseconds, *(stamp for stamp in taken if stamp is not None)])
        while self._admitted and self._admitted[0] <= gone:
            self._admitted.popleft()


def _last_taken(path: Path) -> int | None:
    """Return what a process of the ranker recorded; None, after removing the file, when that process is dead."""
    with suppress(FileNotFoundError):
        if is_held(path):
            stamp: int = struct.unpack("q", path.read_bytes()[:8])[0]
            return stamp
    return None


def hold(folder: Path, name: str, content: bytes = b"") -> int:
    """Return the descriptor of a new file in a folder, whose lock this process holds for as long as it lives."""
    partial = folder / f".{name}"
    file = os.open(partial, os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(file, fcntl.LOCK_EX)
    os.pwrite(file, content, 0)
    partial.rename(folder / name)
    return file


def is_held(path: Path) -> bool:
    """Return whether the process that made a file with :func:`hold` lives; else the file is removed."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        path.unlink()
    return False


def tidy(folder: Path) -> None:
    """Remove the files of dead processes, and the folder when no other file is left."""
    for path in folder.glob("[!.]*"):
        is_held(path)
    with suppress(OSError):
        folder.rmdir()


class RankerTurn:
    """The exit of the queue, at a process of the ranker: no pass is spent on a request whose caller is gone."""

    def __init__(self, folder: Path, seconds: float) -> None:
        """Register this process.

        Args:
            folder: see :func:`queue_folder`.
            seconds: maximum time that a request may have waited.
        """
        self._folder = folder
        self._seconds = seconds
        self._file = hold(folder, str(os.getpid()), struct.pack("q", now()))

    def admit(self, request: Any, tensors: Mapping[TensorSpec, NDArray[Any]]) -> None:
        """Take a Triton request with its tensors out of the queue.

        Raises:
            GivenUpError: it was cancelled.
            LateError: it waited longer than allowed, or longer than its own timeout.
        """
        queued = int(tensors[QUEUED][0])
        if queued:
            self._record(queued)
        waited = (now() - queued) / 1e6
        if waited >= CANCELLATION_SECONDS and request.is_cancelled():
            raise GivenUpError
        limit = min(self._seconds, request.timeout() / 1e6 or self._seconds)
        if queued and waited > limit:
            raise LateError(f"queue timeout: waited {waited:.2f} s of at most {limit:g} s, more arrives than is ranked")

    def close(self) -> None:
        """Remove the queue's files."""
        os.close(self._file)
        tidy(self._folder)

    def _record(self, stamp: int) -> None:
        os.pwrite(self._file, struct.pack("q", stamp), 0)


def open_queue(step: str, arguments: Mapping[str, str]) -> Admission | RankerTurn | None:
    """Return this step's end of the ranker's queue, if it has one, from the arguments of Triton's ``initialize``."""
    seconds, size = parameter(arguments, QUEUE_PARAMETER), parameter(arguments, SIZE_PARAMETER)
    if seconds is None:
        return None
    folder = queue_folder(arguments["model_name"].removeprefix(step))
    return RankerTurn(folder, float(seconds)) if size is None else Admission(folder, int(size), float(seconds))
