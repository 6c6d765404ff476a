"""The line before the ranker: who comes when it is full is refused at once, who waited too long when the turn comes.

Triton's own queue policies would do; but with any of them the batcher of core 2.51 prepares no request ahead, and
sleeps up to half a second before it hands over the next one. So ``prompt_builder`` counts whom it lets in, and every
process of the ranker says in a small file whom it took last.
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

from client.contract import PROBE, QUEUED, TensorSpec
from preprocessing.errors import InputError


class GivenUpError(Exception):
    """The caller cancelled the request or its deadline passed."""


class FullError(Exception):
    """As many prompts wait as can be ranked in time: one more would only wait in vain."""


class LateError(Exception):
    """More requests arrive than can be ranked: this one waited too long to be of use."""


def now() -> int:
    """Microseconds of the clock that all processes of this machine share."""
    return time.monotonic_ns() // 1000


def meeting_place(suffix: str) -> Path:
    """The folder where the steps of one release in one server, their parent process, find each other's files.

    What servers that were killed left behind is removed.

    Raises:
        InputError: another user of this machine made it.
    """
    temporary = Path(tempfile.gettempdir())
    for left in temporary.glob("llamarec-[0-9]*"):
        server = re.findall("[0-9]+", left.name)[0]
        if not Path("/proc", server).exists():
            _tidy(left)
    folder = temporary / f"llamarec-{os.getppid()}{suffix}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise InputError(f"{folder} belongs to another user: remove it, or set TMPDIR to a folder of your own")
    return folder


class Entrance:
    """At ``prompt_builder``: lets in as many as may wait."""

    def __init__(self, folder: Path, size: int, seconds: float) -> None:
        """Args:
        folder: see :func:`meeting_place`.
        size: most prompts that may wait.
        seconds: longest that one waits before the ranker refuses it.
        """
        self._folder = folder
        self._size = size
        self._microseconds = int(seconds * 1e6)
        self._entered: deque[int] = deque()
        """When those came in that may still wait, oldest first."""

    def admit(self, request: Any, asked: Mapping[TensorSpec, NDArray[Any]]) -> None:
        """Lets a request of Triton's in.

        Raises:
            FullError: as many wait already.
        """
        if request.request_id() == PROBE:  # the watch asks this step alone: it never reaches the ranker
            return
        if len(self._entered) >= self._size:
            self._leave()
        if len(self._entered) >= self._size:
            raise FullError(f"queue full: {self._size} wait for the ranker, no more can be ranked in time")
        self._entered.append(now())

    def close(self) -> None:
        """Leaves nothing behind."""
        _tidy(self._folder)

    def _leave(self) -> None:
        """Forgets whom a ranker took or refused by now; all of them when one of its processes is dead.

        Then whoever it had is not waiting any more, and the next ones should be told that it is dead.
        """
        taken = [_last_taken(path) for path in self._folder.glob("[0-9]*")]
        if not taken or None in taken:
            self._entered.clear()
        gone = max([now() - self._microseconds, *(stamp for stamp in taken if stamp is not None)])
        while self._entered and self._entered[0] <= gone:
            self._entered.popleft()


def _last_taken(path: Path) -> int | None:
    """What a process of the ranker wrote; None, and no file any more, when that process is dead."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            stamp: int = struct.unpack("q", file.read(8))[0]
            return stamp
        path.unlink()
    return None


def _tidy(folder: Path) -> None:
    """Removes dead processes' files, and the folder when no other is there."""
    for path in folder.glob("[0-9]*"):
        _last_taken(path)
    with suppress(OSError):
        folder.rmdir()


class Turn:
    """At a process of the ranker: spends no pass on a request that nobody waits for any more."""

    def __init__(self, folder: Path, seconds: float) -> None:
        """Args:
        folder: see :func:`meeting_place`.
        seconds: longest that a request may have waited.
        """
        self._folder = folder
        self._seconds = seconds
        partial = folder / f".{os.getpid()}"
        self._file = os.open(partial, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX)  # for as long as this process lives
        self._take(now())
        partial.rename(folder / str(os.getpid()))

    def admit(self, request: Any, asked: Mapping[TensorSpec, NDArray[Any]]) -> None:
        """Takes a request of Triton's, with its tensors.

        Raises:
            GivenUpError: it was cancelled.
            LateError: it waited longer than it may, or than its own timeout.
        """
        queued = int(asked[QUEUED][0])
        if queued:
            self._take(queued)
        if request.is_cancelled():
            raise GivenUpError
        waited = (now() - queued) / 1e6
        limit = min(self._seconds, request.timeout() / 1e6 or self._seconds)
        if queued and waited > limit:
            raise LateError(f"queue timeout: waited {waited:.2f} s of at most {limit:g} s, more arrives than is ranked")

    def close(self) -> None:
        """Leaves nothing behind."""
        os.close(self._file)
        _tidy(self._folder)

    def _take(self, stamp: int) -> None:
        os.pwrite(self._file, struct.pack("q", stamp), 0)
