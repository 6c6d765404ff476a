"""Collects Python's garbage between requests, so that no collection makes one of them slow.

What a step loads stays for good, and a collection that looks through all of it takes up to a tenth of a second. What
was loaded is therefore set aside. Garbage in cycles, which only a collection frees, is rare in requests; a thread
looks once a second whether there is any.
"""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

LOOK_SECONDS = 1.0
"""Time in seconds between two looks."""
LEAST_OBJECTS = 2_000
"""Number of objects made since the last collection, less those freed, from which it is worth another one."""


class GarbageCollector:
    """Takes the place of Python's automatic collection in this process, until it is closed.

    To be made once everything that stays is loaded.
    """

    def __init__(self) -> None:
        gc.collect()
        gc.freeze()
        gc.disable()
        self._answering = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._collect_regularly, name="garbage", daemon=True)
        self._thread.start()

    @contextmanager
    def held_off(self) -> Iterator[None]:
        """Keep any collection waiting for the duration of a ``with`` block."""
        with self._answering:
            yield

    def close(self) -> None:
        """Return to automatic collection."""
        self._ended.set()
        self._thread.join()
        gc.unfreeze()
        gc.enable()

    def _collect_regularly(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            if gc.get_count()[0] >= LEAST_OBJECTS:
                with self._answering:
                    gc.collect()
