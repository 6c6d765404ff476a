"""The `events` model without a server: what it refuses, what it records, and what it does with a batch."""

import time

import numpy as np
import pytest

from llamarec_client.contract import EVENT_USER, ITEM_ID, KIND, MAX_EVENTS, NEW, TIMESTAMP
from preprocessing.errors import InputError
from serving.steps.events import EventsStep, read_events
from stores.sqlite import SqliteStore
from stores.store import Event, StoreError

NOW = 1_732_791_600_000


def texts(*values: bytes) -> np.ndarray:
    return np.array(values, dtype=object)


def request(user: bytes, *items: bytes, times=None, kinds=None) -> dict:
    tensors = {EVENT_USER: texts(user), ITEM_ID: texts(*items)}
    if times is not None:
        tensors[TIMESTAMP] = np.array(times, dtype=np.int64)
    if kinds is not None:
        tensors[KIND] = texts(*kinds)
    return tensors


def test_times_and_kinds_have_defaults():
    """The kind is `view`; without times, the last milliseconds in the order of the items, the last one now."""
    assert read_events(request(b"ann", b"50", b"181"), NOW) == (
        b"ann",
        [Event(b"50", NOW - 1, b"view"), Event(b"181", NOW, b"view")],
    )
    given = request(b"ann", b"50", times=[5], kinds=[b"purchase"])
    assert read_events(given, NOW) == (b"ann", [Event(b"50", 5, b"purchase")])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (request(b"", b"50"), "USER_ID has 0 bytes: give 1 to 512"),
        (request(b"u" * 513, b"50"), "USER_ID has 513 bytes"),
        (request(b"\xff", b"50"), "USER_ID has 1 bytes: give 1 to 512 bytes of UTF-8"),
        (request(b"ann", b"50", b"i" * 513), r"ITEM_ID\[1\] has 513 bytes: an item id has at most 512"),
        (request(b"ann", b"\xff"), r"ITEM_ID\[0\] is b'\\xff', not UTF-8"),
        (request(b"ann", *[b"i"] * (MAX_EVENTS + 1)), "ITEM_ID holds 10,001 ids: record at most 10,000 events"),
        (request(b"ann", b"50", times=[1, 2]), "TIMESTAMP holds 2 values for 1 items"),
        (request(b"ann", b"50", b"181", kinds=[b"view"]), "KIND holds 1 values for 2 items"),
        (request(b"ann", b"50", b"181", times=[1, -1]), r"TIMESTAMP\[1\] is -1, before 1970"),
        (
            request(b"ann", b"50", times=[NOW + 60_001]),
            rf"TIMESTAMP\[0\] is {NOW + 60_001}, 60 s ahead of the server's clock: give milliseconds",
        ),
        (request(b"ann", b"50", kinds=[b""]), r"KIND\[0\] has 0 bytes: give 1 to 64"),
        (request(b"ann", b"50", kinds=[b"k" * 65]), r"KIND\[0\] has 65 bytes"),
    ],
)
def test_a_request_that_cannot_be_recorded_names_the_tensor(tensors, message):
    with pytest.raises(InputError, match=message):
        read_events(tensors, NOW)


def test_the_largest_request_and_a_clock_that_is_a_minute_ahead_are_taken():
    """The limits themselves are allowed: 10,000 events, a minute, ids of 512 bytes, kinds of 64."""
    tensors = request(
        b"u" * 512, *[b"i" * 512] * MAX_EVENTS, times=[NOW + 60_000] * MAX_EVENTS, kinds=[b"k" * 64] * MAX_EVENTS
    )
    assert len(read_events(tensors, NOW)[1]) == MAX_EVENTS


def test_a_batch_is_one_commit_and_a_bad_request_spoils_no_other(tmp_path, monkeypatch):
    """One of five requests is refused and one has no events; the other three reach the store in one call."""
    store, calls = SqliteStore(tmp_path / "store"), []
    record = store.record
    monkeypatch.setattr(store, "record", lambda writes: calls.append(len(writes)) or record(writes))
    answers = EventsStep(store).answer_all(
        [
            request(b"ann", b"50", times=[1]),
            request(b"ann", b"50", times=[-1]),
            request(b"ann"),
            request(b"ann", b"50", b"181", times=[1, 2]),
            request(b"bob", b"50", times=[1]),
        ]
    )
    assert isinstance(answers[1], InputError)
    assert [answer[NEW] for answer in answers if not isinstance(answer, Exception)] == [[1], [0], [1], [1]]
    assert calls == [3]
    assert [event.item for event in store.last(b"ann")] == [b"50", b"181"]
    store.close()


def test_without_a_store_only_events_are_refused():
    """A probe, which has none, is answered: the process is healthy."""
    answer, refusal = EventsStep.open(None).answer_all([request(b"probe"), request(b"ann", b"50")])
    assert answer == {NEW: [0]}
    assert isinstance(refusal, StoreError)
    assert "llamarec serve --store" in str(refusal)


def test_events_without_times_are_of_now(tmp_path):
    """The server's clock, in milliseconds."""
    store = SqliteStore(tmp_path / "store")
    before = time.time_ns() // 1_000_000
    EventsStep(store).answer_all([request(b"ann", b"50")])
    (event,) = store.last(b"ann")
    assert before <= event.time <= time.time_ns() // 1_000_000
    store.close()
