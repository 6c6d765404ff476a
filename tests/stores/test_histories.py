"""What every kind of store does, compared with a set of events for each user."""

import itertools
import random
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stores.store import AddedItem, Event, StoreError

MOST = 5
"""Number of events that the stores of the generated tests keep, so that histories overflow often."""


class Model:
    """The definition: the last events of the set of all that were recorded, in the order of time, item and kind."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.users: dict[bytes, set[Event]] = {}

    def last(self, user):
        events = self.users.get(user, set())
        # Items of one time by the length of their ids, then by their bytes: whole numbers as preprocessing orders them.
        return sorted(events, key=lambda event: (event.time, len(event.item), event.item, event.kind))[-self.keep :]

    def record(self, user, events):
        before = set(self.last(user))
        self.users[user] = before | set(events)
        return len(set(self.last(user)) - before)

    def forget(self, user):
        count = len(self.last(user))
        self.users.pop(user, None)
        return count

    def merge(self, old, new):
        events = self.last(old)
        if old == new:
            return 0
        self.users.pop(old, None)
        return self.record(new, events)


users = st.sampled_from([b"ann", b"bob", "zo\u00eb".encode(), b"\0"])
events = st.builds(
    Event,
    st.sampled_from([b"1", b"2", b"10", b"view", b"", b"a\0", "\u00fc".encode()]) | st.binary(max_size=600),
    st.integers(0, 6) | st.integers(0, 2**48 - 1),
    st.sampled_from([b"view", b"purchase", b"1", b""]),
)
operations = st.one_of(
    st.tuples(st.just("record"), st.lists(st.tuples(users, st.lists(events, max_size=8)), max_size=4)),
    st.tuples(st.just("forget"), users),
    st.tuples(st.just("merge"), users, users),
)


def test_any_sequence_of_calls_is_that_of_the_definition(opened):
    """Two connections to one store take turns; after every call, all histories are those of the model.

    Among the generated events are late ones, repeated ones, several of one time, and more than are kept.
    """
    first, second = opened(f"?keep={MOST}"), opened(f"?keep={MOST}")

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(operations, max_size=12))
    def run(calls):
        model = Model(MOST)
        for user in (b"ann", b"bob", "zo\u00eb".encode(), b"\0"):
            first.forget(user)
        for store, (name, *arguments) in zip(itertools.cycle([first, second]), calls, strict=False):
            if name == "record":
                (writes,) = arguments
                assert store.record(writes) == [model.record(*write) for write in writes]
            else:
                assert getattr(store, name)(*arguments) == getattr(model, name)(*arguments)
            for reader, user in itertools.product((first, second), (b"ann", b"bob", "zo\u00eb".encode(), b"\0")):
                assert reader.last(user) == model.last(user)
        assert sorted(first.users()) == sorted(user for user, kept in model.users.items() if kept)

    run()


def test_a_store_that_has_to_be_there_is_not_made(opened):
    """The check makes none, so that it fails again; once something is recorded, there is one."""
    for _ in range(2):
        with pytest.raises(StoreError, match=r"there is no store .*: check the address"):
            opened(dataset="movielens-100k").check_exists()
    opened().record([(b"ann", [Event(b"50", 1)])])
    opened().check_exists()


def test_a_thousand_events_are_kept_without_a_number_in_the_address(opened):
    """The default; 1,200 events are recorded backwards, and the 1,000 latest are there in the order of time."""
    store = opened()
    history = [Event(b"%d" % time, time) for time in range(1200)]
    new = store.record([(b"ann", history[place : place + 100]) for place in range(1100, -1, -100)])
    assert new == [100] * 10 + [0, 0]
    assert store.last(b"ann") == history[200:]


def test_users_are_listed_once_each(opened, monkeypatch):
    """Seven users in pages of three, one of them forgotten and one with two records; items and facts are no users."""
    monkeypatch.setattr("stores.sqlite.USERS_AT_ONCE", 3)
    monkeypatch.setattr("stores.redis.USERS_AT_ONCE", 3)
    store = opened(dataset="films")
    assert list(store.users()) == []
    names = [b"a", b"b*", "\u00e9".encode(), b"user:c", b"d", b"17", b"gone"]
    store.record([(name, [Event(b"x", 1)]) for name in [*names, b"d"]])
    store.add_items([AddedItem(b"new", "New")])
    store.hide([b"x"])
    store.forget(b"gone")
    assert sorted(store.users()) == sorted(names[:-1])


def test_a_store_of_another_data_set_is_refused(opened):
    """The first who names a data set decides; who names none takes any."""
    assert opened().dataset() is None
    opened(dataset="movielens-100k").record([(b"ann", [Event(b"50", 1)])])
    assert opened().dataset() == "movielens-100k"
    with pytest.raises(StoreError, match="events of data set 'movielens-100k', not of 'beauty': name another store"):
        opened(dataset="beauty").last(b"ann")
    assert opened(dataset="movielens-100k").last(b"ann") == [Event(b"50", 1)]


WRITER = """
import sys
from stores.address import open_store
from stores.store import Event
store, user, first = open_store(sys.argv[1] + "?keep=10000"), sys.argv[2].encode(), int(sys.argv[3])
for number in range(first, 10**6):
    assert store.record([(user, [Event(b"i%d" % number, number)])]) == [1]
    print(number, flush=True)
"""


def writer(url: str, user: str, first: int) -> subprocess.Popen:
    """Start a process that records one event after another, and tells the time of each that was acknowledged."""
    return subprocess.Popen([sys.executable, "-c", WRITER, url, user, str(first)], stdout=subprocess.PIPE, text=True)


def test_what_was_acknowledged_survives_the_writers(opened, store_url):
    """Two processes write at once and are killed (SIGKILL) at any moment, five times; every event that one of them
    had acknowledged is there, and at most one more, which was kept when its writer died before it could say so.
    """
    store, told = opened("?keep=10000"), {"ann": -1, "bob": -1}
    chance = random.Random(0)
    for _ in range(5):
        processes = {user: writer(store_url, user, last + 1) for user, last in told.items()}
        for process in processes.values():
            assert process.stdout.readline()
        time.sleep(chance.uniform(0, 0.2))
        for process in processes.values():
            process.send_signal(signal.SIGKILL)
        for user, process in processes.items():
            lines = process.communicate()[0].split("\n")[:-1]
            acknowledged = int(lines[-1]) if lines else told[user] + 1
            found = [event.time for event in store.last(user.encode())]
            assert found in (list(range(acknowledged + 1)), list(range(acknowledged + 2)))
            told[user] = found[-1]
    assert min(told.values()) > 10
