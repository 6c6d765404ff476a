"""Stores of version 1: they are refused with the remedy, and migrated without a change of their histories."""

import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import redis

from stores.address import open_store
from stores.store import AddedItem, Event, Listing, StoreError, WrongStoreError

VERSION_1 = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE names (number INTEGER PRIMARY KEY, name BLOB NOT NULL UNIQUE);
CREATE TABLE users (number INTEGER PRIMARY KEY, id BLOB NOT NULL UNIQUE, events BLOB NOT NULL);
"""
"""The tables as version 1 made them."""
HISTORY = [Event(b"50", 1), Event(b"181", 3, b"purchase")]


@pytest.fixture
def url(store_url):
    """Return the address of a store of version 1 with the history of ann and a data set."""
    if store_url.startswith("redis"):
        with closing(redis.Redis.from_url(store_url)) as client:
            client.hset("llamarec:store", mapping={"schema": 1, "dataset": "movielens-100k"})
            # A time in six bytes, the length of the id in two, the id, the kind.
            first, second = (
                bytes([0, 0, 0, 0, 0, 1, 0, 2]) + b"50view",
                bytes([0, 0, 0, 0, 0, 3, 0, 3]) + b"181purchase",
            )
            client.zadd("llamarec:user:ann", {first: 0, second: 0})
        return store_url
    with closing(sqlite3.connect(store_url.removeprefix("sqlite:///"))) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(VERSION_1)
        connection.execute("INSERT INTO facts VALUES ('dataset', 'movielens-100k')")
        names = [(1, b"50"), (2, b"view"), (3, b"181"), (4, b"purchase")]
        connection.executemany("INSERT INTO names VALUES (?, ?)", names)
        # Each event: time since the one before it, number of the item, number of the kind.
        connection.execute("INSERT INTO users (id, events) VALUES (?, ?)", (b"ann", bytes([1, 1, 2, 2, 3, 4])))
        connection.execute(f"PRAGMA application_id = {0x4C524543}")
        connection.execute("PRAGMA user_version = 1")
        connection.commit()
    return store_url


def test_an_older_store_is_refused_with_the_remedy(opened, url):
    """Neither its histories nor its listing are read, and nothing is written."""
    store = opened()
    for use in (lambda: store.last(b"ann"), store.listing, lambda: store.hide([b"50"])):
        with pytest.raises(
            StoreError, match="has version 1, and this llamarec reads 2: run `llamarec users migrate --st"
        ):
            use()


def test_a_migrated_store_has_its_histories_and_an_empty_listing(opened, url):
    """A server that refused the store uses it without a new start. Migrating it again does nothing."""
    server = opened(dataset="movielens-100k")
    with pytest.raises(WrongStoreError):
        server.record([(b"ann", HISTORY)])
    assert opened().migrate() == (1, 2)
    assert server.record([(b"ann", HISTORY)]) == [0]  # known: equal to what version 1 had kept
    assert server.last(b"ann") == HISTORY
    assert server.listing() == Listing(0, (), frozenset())
    assert opened().dataset() == "movielens-100k"
    server.add_items([AddedItem(b"new", "New")])
    assert server.record([(b"bob", [Event(b"new", 4)])]) == [1]
    assert opened().migrate() == (2, 2)
    assert (server.last(b"ann"), len(server.listing().added)) == (HISTORY, 1)


def test_several_may_migrate_at_once(opened, url):
    """Four at the same time: each finds version 2 at its end, and the history is there."""

    def migrate(_):
        with closing(open_store(url)) as store:
            return store.migrate()

    with ThreadPoolExecutor(4) as pool:
        assert {after for _, after in pool.map(migrate, range(4))} == {2}
    assert opened().last(b"ann") == HISTORY


def test_a_newer_store_is_not_migrated(opened, store_url):
    """It is left as it is, so that the newer program still reads it."""
    opened().record([(b"ann", HISTORY)])
    if store_url.startswith("redis"):
        with closing(redis.Redis.from_url(store_url)) as client:
            client.hset("llamarec:store", "schema", 3)
    else:
        with closing(sqlite3.connect(store_url.removeprefix("sqlite:///"))) as connection:
            connection.execute("PRAGMA user_version = 3")
    for _ in range(2):
        with pytest.raises(
            StoreError, match="has version 3, and this llamarec reads 2: install the llamarec that wrote"
        ):
            opened().migrate()


def test_no_store_is_made_by_a_migration(opened, store_url):
    """A mistyped address is told, instead of an empty store that needs no migration."""
    with pytest.raises(StoreError, match=r"there is no store .*: check the address"):
        opened().migrate()
    if store_url.startswith("sqlite"):
        assert not Path(store_url.removeprefix("sqlite:///")).exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from stores import sqlite
make = sqlite._make_tables
def make_and_die(*arguments):
    make(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
sqlite._make_tables = make_and_die
sqlite.SqliteStore(Path(sys.argv[1])).migrate()
"""


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
def test_a_migration_that_is_killed_has_changed_nothing(opened, url):
    """SIGKILL after the last table was made and before the commit: the store has version 1 and can be migrated."""
    path = url.removeprefix("sqlite:///")
    killed = subprocess.run([sys.executable, "-c", KILLED, path], check=False)
    assert killed.returncode == -signal.SIGKILL
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        assert sorted(tables) == ["facts", "names", "users"]
    assert opened().migrate() == (1, 2)
    assert opened().last(b"ann") == HISTORY
