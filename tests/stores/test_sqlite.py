"""The store in one file: what is refused, what it does when it cannot be used, and what is left of the forgotten."""

import os
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import pytest

from stores.sqlite import SqliteStore
from stores.store import Event, StoreError

HISTORY = [Event(b"50", 1), Event(b"181", 2)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "histories.sqlite"


@pytest.fixture
def store(path):
    with closing(SqliteStore(path)) as store:
        store.record([(b"ann", HISTORY)])
        yield store


def test_several_processes_may_make_the_same_store(path):
    """Each of eight processes finds no file and records an event of its own; all eight are there."""
    code = (
        "import sys; from pathlib import Path; from stores.sqlite import SqliteStore; from stores.store import Event;"
        "store = SqliteStore(Path(sys.argv[1]), dataset='d'); sys.stdin.read();"
        "store.record([(b'ann', [Event(b'x', int(sys.argv[2]))])])"
    )
    command = [sys.executable, "-c", code, str(path)]
    processes = [subprocess.Popen([*command, str(number)], stdin=subprocess.PIPE) for number in range(8)]
    time.sleep(1)  # until all of them wait
    for process in processes:
        process.stdin.close()
    assert [process.wait() for process in processes] == [0] * 8
    with closing(SqliteStore(path)) as store:
        assert [event.time for event in store.last(b"ann")] == list(range(8))


def test_other_files_are_refused_and_left_as_they_are(tmp_path):
    """A file of text, and the database of another program."""
    text, other = tmp_path / "text", tmp_path / "other"
    text.write_text("events, one a line\n" * 100)
    with closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE things (name)")
    for path, message in ((text, "another kind of file: name a store"), (other, "another program's database")):
        before = path.read_bytes()
        with pytest.raises(StoreError, match=message):
            SqliteStore(path).record([(b"ann", HISTORY)])
        assert path.read_bytes() == before


def test_a_store_of_a_newer_version_is_refused(store, path):
    """The version is SQLite's `user_version`; the message says which program reads it."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 3")
    with pytest.raises(StoreError, match="has version 3, and this llamarec reads 2: install the llamarec that wrote"):
        SqliteStore(path).last(b"ann")


def test_a_folder_that_is_missing_is_named_and_used_once_it_is_there(tmp_path):
    """The same object works again when the cause is gone."""
    store = SqliteStore(tmp_path / "folder" / "histories.sqlite")
    with pytest.raises(StoreError, match=r"folder/histories\.sqlite cannot be used .*its folder must exist"):
        store.last(b"ann")
    (tmp_path / "folder").mkdir()
    assert store.record([(b"ann", HISTORY)]) == [2]
    store.close()


def test_a_file_that_is_moved_away_is_missed_and_one_that_is_put_back_is_read(store, path, tmp_path):
    """A running server must not go on with an empty store; a backup in the file's place is read at once."""
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(tmp_path / "backup")) as backup:
        source.backup(backup)
    store.record([(b"ann", [Event(b"later", 3)])])
    store.close()
    for file in path.parent.glob("histories.sqlite*"):
        file.unlink()
    with pytest.raises(StoreError, match="is gone: put the file back"):
        store.last(b"ann")
    shutil.copy(tmp_path / "backup", path)
    assert store.last(b"ann") == HISTORY


def test_a_writer_that_keeps_the_file_stops_no_reader(store, path, monkeypatch):
    """Another writer waits its time and then gives up; what it did not keep is kept later."""
    monkeypatch.setattr("stores.sqlite.WRITE_SECONDS", 0.2)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match=r"another writer has kept it for more than 0\.2 s, try again"):
            store.record([(b"ann", [Event(b"late", 3)])])
        assert store.last(b"ann") == HISTORY
        other.execute("ROLLBACK")
    assert store.record([(b"ann", [Event(b"late", 3)])]) == [1]


def test_a_full_disk_is_named_and_nothing_is_half_kept(store, path):
    """`max_page_count` is SQLite's own limit, with the error of a full disk. Both users of the write are as before."""
    pages = store._open().execute("PRAGMA page_count").fetchone()[0]
    store._open().execute(f"PRAGMA max_page_count = {pages}")
    many = [Event(b"%0200d" % number, number) for number in range(1000)]
    with pytest.raises(StoreError, match="make room on its disk"):
        store.record([(b"bob", HISTORY), (b"ann", many)])
    assert (store.last(b"ann"), store.last(b"bob")) == (HISTORY, [])
    # Of 1,002 events the last 1,000 stay: without `many[0]` of time 0, and "50" of time 1.
    assert store.record([(b"ann", many)]) == [999]


def test_nothing_is_left_of_who_was_forgotten(store, path):
    """Neither in the file nor in its log: the id of the user is nowhere in their bytes."""
    name = b"a-name-that-nobody-else-has"
    store.record([(name, HISTORY), (b"bob", HISTORY)])
    assert any(name in file.read_bytes() for file in path.parent.iterdir())
    assert store.forget(name) == 2
    assert not any(name in file.read_bytes() for file in path.parent.iterdir())
    assert store.last(b"bob") == HISTORY


def test_a_commit_waits_for_the_disk(store):
    """`synchronous` 2 is FULL (SQLite's documentation): in write-ahead mode, a sync for each transaction."""
    assert store._open().execute("PRAGMA synchronous").fetchone() == (2,)
    assert store._open().execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_history_takes_few_bytes(store, path):
    """800 bytes are the goal for a user of 50 items. A thousand such users, who return within days."""
    day = 86_400_000
    store.record(
        [
            (b"user-%d" % user, [Event(b"%d" % (user * 7 % 500 + place), place * day + user) for place in range(50)])
            for user in range(1000)
        ]
    )
    store.close()
    assert os.path.getsize(path) < 800 * 1000
