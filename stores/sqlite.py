"""Histories and added items in one SQLite file, without a service; all processes on one machine can use it together.

The file is in write-ahead mode: readers never wait for the writer, and see what was committed before they began. A
commit returns after its bytes are on the disk (``synchronous=FULL``), so it survives the machine's end as well.
"""

import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from stores.packing import Numbers, pack, unpack
from stores.store import (
    KEEP,
    SCHEMA,
    AddedItem,
    Event,
    Listing,
    StoreError,
    Write,
    WrongStoreError,
    check_dataset,
    check_not_newer,
    check_schema,
    new_revision,
    order,
)

APPLICATION = 0x4C524543
"""SQLite's application id of a store ("LREC"), which tells it apart from other databases."""
READ_SECONDS, WRITE_SECONDS = 0.05, 5.0
"""Maximum time in seconds to wait for a lock. Readers wait for none unless another program locks the whole file."""
POLL_SECONDS = 0.001
"""Time in seconds between two attempts of a waiting writer."""
USERS_AT_ONCE = 1_000
"""Number of users that are listed in one read."""
MOST_NAMES = 1 << 18
"""Number of names that a process remembers; it then begins anew."""
TABLES_1 = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE names (number INTEGER PRIMARY KEY, name BLOB NOT NULL UNIQUE);
CREATE TABLE users (number INTEGER PRIMARY KEY, id BLOB NOT NULL UNIQUE, events BLOB NOT NULL);
"""
"""Tables of version 1: `names` numbers items and kinds; `events` holds a history as :mod:`stores.packing` packs it."""
TABLES_2 = """
CREATE TABLE added (place INTEGER PRIMARY KEY, item BLOB NOT NULL UNIQUE, title TEXT NOT NULL);
CREATE TABLE hidden (item BLOB PRIMARY KEY) WITHOUT ROWID;
"""
"""Tables that version 2 adds. The revision of the listing is one of the `facts`."""
TABLES = {1: TABLES_1, 2: TABLES_2}
"""Tables that each version adds to those of the version before."""
REVISION = "revision"
"""Name of the fact."""


class SqliteStore:
    """A store in one file.

    Args:
        path: the file; the first connection makes it if it is absent.
        keep: number of events that are kept for a user.
        dataset: name of the data set whose items the events name. A new store takes it; a store of another is refused.
    """

    def __init__(self, path: Path, *, keep: int = KEEP, dataset: str | None = None) -> None:
        self.name = f"sqlite:///{path}"
        self._path, self._keep, self._dataset = path, keep, dataset
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        """Device and number of the file that is open: the path may come to name another one."""
        self._numbers: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}

    def record(self, writes: Sequence[Write]) -> list[int]:
        """Keep events in one transaction; see :meth:`stores.store.Store.record`."""
        with self._transaction() as connection:
            return [self._add(connection, user, events) for user, events in writes]

    def last(self, user: bytes) -> list[Event]:
        """Return the kept events of a user, oldest first."""
        with self._errors():
            connection = self._open()
            return self._events(connection, self._packed(connection, user))[-self._keep :]

    def users(self) -> Iterator[bytes]:
        """Yield the raw id of every user with events, in the order of their bytes."""
        last = b""
        while True:
            with self._errors():
                query = "SELECT id FROM users WHERE id > ? ORDER BY id LIMIT ?"
                rows = self._open().execute(query, (last, USERS_AT_ONCE)).fetchall()
            yield from (user for (user,) in rows)
            if len(rows) < USERS_AT_ONCE:
                return
            last = rows[-1][0]

    def forget(self, user: bytes) -> int:
        """Delete all events of a user, from the write-ahead log too, and return how many there were."""
        with self._transaction() as connection:
            count = self._delete(connection, user)
        with self._errors():
            self._open().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return count

    def merge(self, old: bytes, new: bytes) -> int:
        """Give the events of one user to another; see :meth:`stores.store.Store.merge`."""
        if old == new:
            return 0
        with self._transaction() as connection:
            events = self._events(connection, self._packed(connection, old))
            self._delete(connection, old)
            return self._add(connection, new, events)

    def listing(self, known: int | None = None) -> Listing | None:
        """Return the added and hidden items; see :meth:`stores.store.Store.listing`."""
        with self._errors():
            connection = self._open()
            if _revision(connection) == known:
                return None
            connection.execute("BEGIN")  # so that all three reads see the same commit
            try:
                added = connection.execute("SELECT item, title FROM added ORDER BY place").fetchall()
                hidden = connection.execute("SELECT item FROM hidden").fetchall()
                return Listing(
                    _revision(connection), tuple(map(AddedItem._make, added)), frozenset(item for (item,) in hidden)
                )
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    def add_items(self, items: Sequence[AddedItem]) -> int:
        """Add items or change their titles in one transaction; see :meth:`stores.store.Store.add_items`."""
        return self._change(
            "INSERT INTO added (item, title) VALUES (?, ?)"
            " ON CONFLICT (item) DO UPDATE SET title = excluded.title WHERE title <> excluded.title",
            dict(items).items(),
        )

    def hide(self, items: Sequence[bytes]) -> int:
        """Hide items, and return how many were not hidden."""
        return self._change("INSERT OR IGNORE INTO hidden VALUES (?)", [(item,) for item in items])

    def show(self, items: Sequence[bytes]) -> int:
        """Show hidden items again, and return how many were hidden."""
        return self._change("DELETE FROM hidden WHERE item = ?", [(item,) for item in items])

    def migrate(self) -> tuple[int, int]:
        """Add the tables of newer versions in one transaction; see :meth:`stores.store.Store.migrate`."""
        self.check_exists()
        self.close()
        with self._errors(), closing(self._connect()) as connection:
            self._recognise(connection)
            _write(connection, "BEGIN IMMEDIATE")
            found = _pragma(connection, "user_version")
            check_not_newer(self.name, found)
            _make_tables(connection, found)
            connection.execute("COMMIT")
        return found, SCHEMA

    def check_exists(self) -> None:
        """Check that the file is there; see :meth:`stores.store.Store.check_exists`."""
        if not self._path.exists():
            raise StoreError(f"there is no store {self.name}: check the address")

    def dataset(self) -> str | None:
        """Return the name of the data set whose items the events name; None if nobody has said it yet."""
        with self._errors():
            return _fact(self._open(), "dataset")

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        self._numbers.clear()
        self._names.clear()

    # --- added and hidden items

    def _change(self, statement: str, rows: Iterable[Sequence[object]]) -> int:
        """Execute a statement for each row in one transaction, and return how many rows of the listing changed."""
        with self._transaction() as connection:
            changed = connection.executemany(statement, rows).rowcount
            if changed:
                revision = max(_revision(connection) + 1, new_revision())
                connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (REVISION, str(revision)))
            return changed

    # --- histories

    def _packed(self, connection: sqlite3.Connection, user: bytes) -> bytes:
        row = connection.execute("SELECT events FROM users WHERE id = ?", (user,)).fetchone()
        return row[0] if row else b""

    def _events(self, connection: sqlite3.Connection, packed: bytes) -> list[Event]:
        name = self._named(connection)
        return [Event(name(item), time, name(kind)) for time, item, kind in unpack(packed)]

    def _add(self, connection: sqlite3.Connection, user: bytes, events: Sequence[Event]) -> int:
        number = self._numbered(connection)
        packed = self._packed(connection, user)
        before = unpack(packed)
        added = {(event.time, number(event.item), number(event.kind)): event for event in events}
        for known in before:
            added.pop(known, None)
        if not added:
            return 0
        if not before or min(added)[0] > before[-1][0]:  # later than all: the usual case needs no names
            history = before + sorted(added, key=lambda numbers: order(added[numbers]))
        else:
            name = self._named(connection)
            known_events = {numbers: Event(name(numbers[1]), numbers[0], name(numbers[2])) for numbers in before}
            both = known_events | added
            history = sorted(both, key=lambda numbers: order(both[numbers]))
        kept: list[Numbers] = history[-self._keep :]
        connection.execute(
            "INSERT INTO users (id, events) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET events = excluded.events",
            (user, pack(kept)),
        )
        return len(added) if len(kept) == len(history) else sum(numbers in added for numbers in kept)

    def _delete(self, connection: sqlite3.Connection, user: bytes) -> int:
        count = len(unpack(self._packed(connection, user)))
        connection.execute("DELETE FROM users WHERE id = ?", (user,))
        return count

    # --- names

    def _numbered(self, connection: sqlite3.Connection) -> Callable[[bytes], int]:
        """Return a function that returns the number of a name, a new one if it has none."""
        if len(self._numbers) > MOST_NAMES:
            self._numbers.clear()

        def number(name: bytes) -> int:
            if name not in self._numbers:
                connection.execute("INSERT OR IGNORE INTO names (name) VALUES (?)", (name,))
                row = connection.execute("SELECT number FROM names WHERE name = ?", (name,)).fetchone()
                self._numbers[name] = row[0]
            return self._numbers[name]

        return number

    def _named(self, connection: sqlite3.Connection) -> Callable[[int], bytes]:
        """Return a function that returns the name of a number."""
        if len(self._names) > MOST_NAMES:
            self._names.clear()

        def name(number: int) -> bytes:
            if number not in self._names:
                row = connection.execute("SELECT name FROM names WHERE number = ?", (number,)).fetchone()
                self._names[number] = row[0]
            return self._names[number]

        return name

    # --- the connection

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Yield the connection within a transaction of the only writer."""
        with self._errors():
            connection = self._open()
            _write(connection, "BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                self._numbers.clear()  # a name that is not kept after all leaves its number to another
                self._names.clear()
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise SQLite's errors as those of a store."""
        try:
            yield
        except sqlite3.Error as error:
            self.close()
            message, remedy = str(error), "check the file and its folder"
            if "full" in message:
                remedy = "make room on its disk"
            elif "locked" in message:
                remedy = f"another writer has kept it for more than {WRITE_SECONDS:g} s, try again"
            elif "readonly" in message or "unable to open" in message:
                remedy = "its folder must exist, and this user must be able to write both"
            elif isinstance(error, sqlite3.DatabaseError) and "not a database" in message:
                raise WrongStoreError(
                    f"the store {self.name} is another kind of file: name a store, or a file that is absent"
                ) from error
            raise StoreError(f"the store {self.name} cannot be used ({message}): {remedy}") from error

    def _open(self) -> sqlite3.Connection:
        """Return the connection to the file that the path names now."""
        try:
            status = os.stat(self._path)
            now = (status.st_dev, status.st_ino)
        except OSError:
            now = None
        if self._connection is not None:
            if now == self._file:
                return self._connection
            self.close()  # a backup was put in its place, or it was moved away
        if now is None and self._file is not None:
            raise StoreError(f"the store {self.name} is gone: put the file back, or start again for an empty one")
        connection = self._connect()
        try:
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        status = os.stat(self._path)
        self._connection, self._file = connection, (status.st_dev, status.st_ino)
        return connection

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=READ_SECONDS, isolation_level=None)

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Check the file, and make the tables of a new one.

        Raises:
            WrongStoreError: it is no store, or one of another version or data set.
        """
        self._recognise(connection)
        check_schema(self.name, _pragma(connection, "user_version"))
        if self._dataset is not None and _fact(connection, "dataset") != self._dataset:
            _write(connection, "INSERT OR IGNORE INTO facts VALUES ('dataset', ?)", [self._dataset])
            check_dataset(self.name, _fact(connection, "dataset"), self._dataset)

    def _recognise(self, connection: sqlite3.Connection) -> None:
        """Make the tables of a new file, and check that the file is a store, of whatever version.

        Raises:
            WrongStoreError: it is not.
        """
        if not _pragma(connection, "application_id") and not _pragma(connection, "schema_version"):
            _write(connection, "PRAGMA journal_mode = WAL")
            _write(connection, "BEGIN IMMEDIATE")  # of several processes that find a new file, one makes the tables
            if not _pragma(connection, "application_id"):
                _make_tables(connection)
                connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute("COMMIT")
        if _pragma(connection, "application_id") != APPLICATION:
            raise WrongStoreError(f"the store {self.name} is another program's database: name a file that is absent")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA secure_delete = ON")  # what is forgotten is overwritten


def _make_tables(connection: sqlite3.Connection, version: int = 0) -> None:
    """Make the tables that a store of a version lacks, within a transaction; version 0 has none."""
    for tables in (TABLES[newer] for newer in range(version + 1, SCHEMA + 1)):
        for statement in filter(str.strip, tables.split(";")):
            connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {SCHEMA}")


def _write(connection: sqlite3.Connection, statement: str, values: Sequence[object] = ()) -> None:
    """Execute a statement that needs the lock of the only writer, as soon as the lock is free.

    SQLite itself asks for the lock ten times a second, and would hardly ever get it beside a writer without pauses.
    """
    end = time.monotonic() + WRITE_SECONDS
    _wait(connection, 0)
    while not _written(connection, statement, values, end):
        time.sleep(POLL_SECONDS)
    _wait(connection, READ_SECONDS)


def _written(connection: sqlite3.Connection, statement: str, values: Sequence[object], end: float) -> bool:
    try:
        connection.execute(statement, values)
    except sqlite3.OperationalError as error:
        if "locked" not in str(error) or time.monotonic() > end:
            raise
        return False
    return True


def _wait(connection: sqlite3.Connection, seconds: float) -> None:
    """Set the maximum time that the connection waits for a lock."""
    connection.execute(f"PRAGMA busy_timeout = {round(1000 * seconds)}")


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    value: int = connection.execute(f"PRAGMA {name}").fetchone()[0]
    return value


def _revision(connection: sqlite3.Connection) -> int:
    return int(_fact(connection, REVISION) or 0)


def _fact(connection: sqlite3.Connection, name: str) -> str | None:
    row = connection.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
    return row[0] if row else None
