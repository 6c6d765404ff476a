"""What is prepared in a thread: its order, how much of it is held, and what happens to errors."""

import threading
import time

import pytest

from models.ranker.fitting.ahead import prepared_ahead
from preprocessing.errors import InputError


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prepared-ahead")]


def test_everything_comes_in_order_and_the_thread_ends():
    """Later items are prepared faster than earlier ones, and still come after them."""

    def prepare(number: int) -> int:
        time.sleep(0.002 * (5 - number))
        assert threads() == [threading.current_thread().name]
        return number * number

    assert list(prepared_ahead(prepare, range(5), ahead=3)) == [0, 1, 4, 9, 16]
    assert list(prepared_ahead(prepare, [], ahead=3)) == []
    assert threads() == []


def test_no_more_than_the_limit_is_held():
    """While the first result is used, two others may be ready: three were prepared, of ten."""
    prepared: list[int] = []
    ahead = prepared_ahead(prepared.append, range(10), ahead=2)
    next(ahead)
    deadline = time.monotonic() + 5
    while len(prepared) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert prepared == [0, 1, 2]
    ahead.close()
    assert threads() == []
    assert len(prepared) < 10


def test_an_error_comes_in_its_turn_with_its_own_message():
    """The two results before it are delivered first; the thread has ended then."""

    def prepare(number: int) -> int:
        if number == 2:
            raise InputError("20 candidates take 900 tokens")
        return number

    found: list[int] = []
    with pytest.raises(InputError, match="20 candidates take 900 tokens"):
        found.extend(prepared_ahead(prepare, range(9), ahead=4))
    ahead = prepared_ahead(prepare, range(9), ahead=4)
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(InputError):
        next(ahead)
    assert threads() == []
