"""The store in Redis: its death, its return, and what is refused."""

import time
from contextlib import closing
from pathlib import Path

import pytest
import redis
from redis_server import RedisServer

from stores.address import open_store
from stores.store import AddedItem, Event, StoreError

pytestmark = [pytest.mark.redis, pytest.mark.thorough]
HISTORY = [Event(b"50", 1), Event(b"181", 2)]


@pytest.fixture
def store(redis_server):
    with closing(open_store(redis_server.url)) as store:
        yield store


def test_what_was_acknowledged_survives_redis(store, redis_server):
    """Redis is killed (SIGKILL) after every acknowledgement and started again; the same store goes on by itself."""
    for number in range(5):
        assert store.record([(b"ann", [Event(b"%d" % number, number)])]) == [1]
        redis_server.kill()
        with pytest.raises(StoreError, match="start Redis"):
            store.last(b"ann")
        redis_server.start()
        time.sleep(0.25)  # the pause after a failed look-up
        assert [event.time for event in store.last(b"ann")] == list(range(number + 1))


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("state", ["dead", "stopped"])
def test_a_look_up_without_redis_fails_soon(store, redis_server, state, order):
    """Within 100 ms, whether nothing listens or what listens does not answer; then at once for a moment. Those of
    histories and of the listing share the moment, whichever comes first.
    """
    store.record([(b"ann", HISTORY)])
    redis_server.kill() if state == "dead" else redis_server.process.send_signal(19)  # SIGSTOP
    look_ups = (lambda: store.last(b"ann")), store.listing
    for limit, look_up in zip((0.1, 0.01, 0.01), look_ups[order:] + look_ups, strict=False):
        began = time.monotonic()
        with pytest.raises(StoreError, match=f"127.0.0.1:{redis_server.port}"):
            look_up()
        assert time.monotonic() - began < limit
    if state == "stopped":
        redis_server.process.send_signal(18)  # SIGCONT
        time.sleep(0.25)
        assert store.last(b"ann") == HISTORY


def test_a_long_listing_is_read(store):
    """A listing of 100,000 items takes Redis longer than a look-up may wait; one that is known is not read."""
    store.add_items([AddedItem(b"%d" % number, f"Title of item {number}") for number in range(100_000)])
    listing = store.listing()
    assert [int(item) for item, _ in listing.added] == list(range(100_000))
    began = time.monotonic()
    assert store.listing(listing.revision) is None
    assert time.monotonic() - began < 0.05


def test_a_password_is_asked_for_and_never_shown(tmp_path):
    server = RedisServer(tmp_path, "--requirepass", "secret")
    try:
        address = f"127.0.0.1:{server.port}/0"
        with closing(open_store(f"redis://{address}")) as store, pytest.raises(StoreError, match="PASSWORD@127"):
            store.last(b"ann")
        with closing(open_store(f"redis://:wrong@{address}")) as store, pytest.raises(StoreError) as refused:
            store.record([(b"ann", HISTORY)])
        assert "wrong" not in str(refused.value)
        with closing(open_store(f"redis://:secret@{address}")) as store:
            assert store.record([(b"ann", HISTORY)]) == [2]
            assert store.name == f"redis://{address}"
    finally:
        server.kill()


def test_a_store_of_a_newer_version_is_refused(store, redis_server):
    store.record([(b"ann", HISTORY)])
    with redis.Redis(port=redis_server.port) as client:
        client.hset("llamarec:store", "schema", 3)
    with closing(open_store(redis_server.url)) as other, pytest.raises(StoreError, match="has version 3"):
        other.last(b"ann")


def test_keys_of_another_program_are_refused(store, redis_server):
    with redis.Redis(port=redis_server.port) as client:
        client.set("llamarec:user:ann", "text")
    with pytest.raises(StoreError, match="keys belong to another program, name another database"):
        store.record([(b"ann", HISTORY)])


def test_full_memory_is_named(store, redis_server):
    with redis.Redis(port=redis_server.port) as client:
        client.config_set("maxmemory", 1)
        with pytest.raises(StoreError, match="give Redis more memory"):
            store.record([(b"ann", HISTORY)])
        client.config_set("maxmemory", 0)
    assert store.record([(b"ann", HISTORY)]) == [2]


def test_a_missing_server_fails_the_tests(monkeypatch, tmp_path: Path):
    """These tests must not pass where they have nothing to run against."""
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(AssertionError, match="make system-packages"):
        RedisServer(tmp_path)
