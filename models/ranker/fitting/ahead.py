"""Prepares what a loop takes next in a thread, while the device computes."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Given = TypeVar("Given")
Prepared = TypeVar("Prepared")


def prepared_ahead(
    prepare: Callable[[Given], Prepared], given: Iterable[Given], ahead: int
) -> Generator[Prepared, None, None]:
    """Yield what ``prepare`` returns for each of ``given``, in their order, and raise what it raises in its turn.

    The thread ends with the generator, which must be exhausted or closed.

    Args:
        prepare: function that is called in the thread, for one after the other.
        given: its arguments.
        ahead: maximum number of results that are held.
    """
    rest = iter(given)
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prepared-ahead")
    try:
        waiting = deque(thread.submit(prepare, one) for one in islice(rest, ahead))
        while waiting:
            prepared = waiting.popleft().result()
            waiting.extend(thread.submit(prepare, one) for one in islice(rest, 1))
            yield prepared
    finally:
        thread.shutdown(cancel_futures=True)
