"""Histories and added items in Redis, for servers on several machines.

Each user is a sorted set whose members all have score 0, so that Redis orders them by their bytes: time, length of the
item's id, id, kind (:func:`stores.store.order`). What a record or a merge does to a user is part of one script, which
Redis runs as a whole; so is each change of the added and hidden items. Whether acknowledged events survive the end of
Redis is a setting of Redis: ``appendonly yes`` and ``appendfsync always``.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from urllib.parse import urlsplit

from redis import Redis
from redis import exceptions as errors
from redis.backoff import NoBackoff
from redis.retry import Retry

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
)

PREFIX = b"llamarec:"
FACTS = PREFIX + b"store"
"""Key of a hash with the version, the data set and the revision of the listing."""
ADDED, TITLES, HIDDEN = PREFIX + b"added", PREFIX + b"titles", PREFIX + b"hidden"
"""Keys of a list of the added items' ids in their places, of a hash of their titles, and of the set of hidden ids."""
CONNECT_SECONDS = 0.04
READ_SECONDS, WRITE_SECONDS = 0.05, 5.0
"""Maximum time in seconds for an answer. A look-up gives up soon: requests that need no store wait behind it."""
USERS_AT_ONCE = 1_000
"""Number of keys that Redis looks at in one step of a listing of the users."""
PAUSE_SECONDS = 0.25
"""Time in seconds after a failed look-up during which further ones fail at once, for the same reason."""
ADD = """
local keep = tonumber(ARGV[1])
local function add(key, members)
  local added, new = {}, 0
  for _, member in ipairs(members) do
    if redis.call('ZADD', key, 0, member) == 1 then added[#added + 1] = member end
  end
  if redis.call('ZREMRANGEBYRANK', key, 0, -keep - 1) == 0 then return #added end
  for _, member in ipairs(added) do
    if redis.call('ZSCORE', key, member) then new = new + 1 end
  end
  return new
end
"""
"""Adds events and removes the oldest ones; returns how many of the added ones are still there."""
RECORD = (
    ADD
    + """
local counts, place = {}, 2
for number, key in ipairs(KEYS) do
  local members = {}
  for _ = 1, tonumber(ARGV[place]) do
    place = place + 1
    members[#members + 1] = ARGV[place]
  end
  place = place + 1
  counts[number] = add(key, members)
end
return counts
"""
)
"""For each key, takes the number of its events and the events."""
MERGE = (
    ADD
    + """
local members = redis.call('ZRANGE', KEYS[2], 0, -1)
redis.call('DEL', KEYS[2])
return add(KEYS[1], members)
"""
)
REVISE = """
local function revise(changed)
  if changed > 0 and redis.call('HINCRBY', KEYS[1], 'revision', 1) < tonumber(ARGV[1]) then
    redis.call('HSET', KEYS[1], 'revision', ARGV[1])
  end
  return changed
end
local changed = 0
"""
"""Gives a listing that changed its next revision; returns the number of changes."""
ADD_ITEMS = (
    REVISE
    + """
for place = 2, #ARGV, 2 do
  local item, title = ARGV[place], ARGV[place + 1]
  local before = redis.call('HGET', KEYS[3], item)
  if not before then redis.call('RPUSH', KEYS[2], item) end
  if before ~= title then
    redis.call('HSET', KEYS[3], item, title)
    changed = changed + 1
  end
end
return revise(changed)
"""
)
"""Takes ids and titles in turns."""
HIDE = (
    REVISE
    + """
for place = 3, #ARGV do
  changed = changed + redis.call(ARGV[2], KEYS[2], ARGV[place])
end
return revise(changed)
"""
)
"""Takes SADD or SREM, and ids."""
SCRIPT_EVENTS = 2_000
"""Number of events after which a script ends: Redis waits for the disk after each, and does nothing else during it."""


class RedisStore:
    """A store in one database of a Redis server.

    Args:
        url: ``redis://[[user]:password@]host[:port][/database]``, or ``rediss://`` for TLS.
        keep: number of events that are kept for a user.
        dataset: name of the data set whose items the events name. A new store takes it; a store of another is refused.
    """

    def __init__(self, url: str, *, keep: int = KEEP, dataset: str | None = None) -> None:
        parts = urlsplit(url)
        self.name = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()
        self._keep, self._dataset = keep, dataset
        self._reader, self._writer = _client(url, READ_SECONDS), _client(url, WRITE_SECONDS)
        self._checked = False
        self._down: tuple[float, StoreError] | None = None
        """Until when look-ups fail, on the monotonic clock, and with which error."""

    def record(self, writes: Sequence[Write]) -> list[int]:
        """Keep events, those of each user at once; see :meth:`stores.store.Store.record`."""
        with self._errors(), self._writer.pipeline(transaction=False) as pipeline:
            self._check(self._writer)
            for part in _parts(writes):
                events = chain.from_iterable((len(events), *map(_member, events)) for _, events in part)
                pipeline.eval(RECORD, len(part), *(_key(user) for user, _ in part), self._keep, *events)
            return [int(new) for counts in pipeline.execute() for new in counts]

    def last(self, user: bytes) -> list[Event]:
        """Return the kept events of a user, oldest first."""
        with self._look_up() as reader:
            members = reader.zrange(_key(user), -self._keep, -1)
        return [_event(member) for member in members]

    def users(self) -> Iterator[bytes]:
        """Yield the raw id of every user with events, in no order; Redis may name a key twice while it is resized."""
        seen: set[bytes] = set()
        with self._errors():
            self._check(self._writer)
            for key in self._writer.scan_iter(_key(b"*"), count=USERS_AT_ONCE):
                if key not in seen:
                    seen.add(key)
                    yield key.removeprefix(_key(b""))

    def forget(self, user: bytes) -> int:
        """Delete all events of a user, and return how many there were."""
        with self._errors(), self._writer.pipeline(transaction=True) as pipeline:
            self._check(self._writer)
            count, _ = pipeline.zcard(_key(user)).delete(_key(user)).execute()
            return int(count)

    def merge(self, old: bytes, new: bytes) -> int:
        """Give the events of one user to another; see :meth:`stores.store.Store.merge`."""
        if old == new:
            return 0
        with self._errors():
            self._check(self._writer)
            return int(self._writer.eval(MERGE, 2, _key(new), _key(old), self._keep))

    def listing(self, known: int | None = None) -> Listing | None:
        """Return the added and hidden items; see :meth:`stores.store.Store.listing`.

        A listing that changed may be long, and is read with the patience of a writer.
        """
        with self._look_up() as reader:
            if int(reader.hget(FACTS, "revision") or 0) == known:
                return None
            with self._writer.pipeline(transaction=True) as pipeline:
                pipeline.hget(FACTS, "revision").lrange(ADDED, 0, -1).hgetall(TITLES).smembers(HIDDEN)
                revision, added, titles, hidden = pipeline.execute()
        items = tuple(AddedItem(item, titles[item].decode()) for item in added)
        return Listing(int(revision or 0), items, frozenset(hidden))

    def add_items(self, items: Sequence[AddedItem]) -> int:
        """Add items or change their titles in one script; see :meth:`stores.store.Store.add_items`."""
        return self._change(ADD_ITEMS, [FACTS, ADDED, TITLES], chain.from_iterable(dict(items).items()))

    def hide(self, items: Sequence[bytes]) -> int:
        """Hide items, and return how many were not hidden."""
        return self._change(HIDE, [FACTS, HIDDEN], ["SADD", *items])

    def show(self, items: Sequence[bytes]) -> int:
        """Show hidden items again, and return how many were hidden."""
        return self._change(HIDE, [FACTS, HIDDEN], ["SREM", *items])

    def migrate(self) -> tuple[int, int]:
        """Set the version, as the keys of version 1 are valid in 2; see :meth:`stores.store.Store.migrate`."""
        with self._errors():
            found = self._schema()
            check_not_newer(self.name, found)
            self._writer.hset(FACTS, "schema", SCHEMA)
        return found, SCHEMA

    def check_exists(self) -> None:
        """Check that a store's facts are there; see :meth:`stores.store.Store.check_exists`."""
        with self._errors():
            self._schema()

    def dataset(self) -> str | None:
        """Return the name of the data set whose items the events name; None if nobody has said it yet."""
        with self._errors():
            self._check(self._writer)
            found: bytes | None = self._writer.hget(FACTS, "dataset")
            return found.decode() if found else None

    def close(self) -> None:
        """Close the connections."""
        self._reader.close()
        self._writer.close()

    def _schema(self) -> int:
        """Return the version of a store that has to be there."""
        found: bytes | None = self._writer.hget(FACTS, "schema")
        if found is None:
            raise StoreError(f"there is no store {self.name}: check the address")
        return int(found)

    def _check(self, client: Redis) -> None:
        """Check version and data set once for each start of Redis, and write those of a new store.

        Raises:
            WrongStoreError: they are others.
        """
        if self._checked:
            return
        client.hsetnx(FACTS, "schema", SCHEMA)
        if self._dataset is not None:
            client.hsetnx(FACTS, "dataset", self._dataset)
        schema, dataset = client.hmget(FACTS, "schema", "dataset")
        check_schema(self.name, int(schema))
        if self._dataset is not None:
            check_dataset(self.name, dataset.decode(), self._dataset)
        self._checked = True

    def _change(self, script: str, keys: Sequence[bytes], values: Iterable[bytes | str]) -> int:
        """Change the listing, and return how many of its items changed."""
        with self._errors():
            self._check(self._writer)
            return int(self._writer.eval(script, len(keys), *keys, new_revision(), *values))

    @contextmanager
    def _look_up(self) -> Iterator[Redis]:
        """Yield the client for a look-up; after one that failed, fail at once for a moment."""
        if self._down and time.monotonic() < self._down[0]:
            raise StoreError(str(self._down[1]))
        try:
            with self._errors():
                self._check(self._reader)
                yield self._reader
        except StoreError as error:
            self._down = time.monotonic() + PAUSE_SECONDS, error
            raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise the errors of Redis as those of a store."""
        try:
            yield
        except errors.RedisError as error:
            self._checked = False  # another Redis may answer at this address next time
            raise _store_error(self.name, error) from error


def _client(url: str, seconds: float) -> Redis:
    """Return a client whose answers take at most so long; one that was cut off connects again at once."""
    return Redis.from_url(
        url,
        socket_connect_timeout=CONNECT_SECONDS,
        socket_timeout=seconds,
        retry=Retry(NoBackoff(), 1, supported_errors=(errors.ConnectionError,)),
    )


def _store_error(name: str, error: errors.RedisError) -> StoreError:
    message = f"the store {name} cannot be used ({error})"
    if isinstance(error, (errors.AuthenticationError, errors.NoPermissionError)):
        scheme, _, rest = name.partition("://")
        return WrongStoreError(f"{message}: name it with its password, {scheme}://USER:PASSWORD@{rest}")
    if isinstance(error, errors.ResponseError) and "WRONGTYPE" in str(error):
        return WrongStoreError(f"{message}: its keys belong to another program, name another database")
    if isinstance(error, errors.ResponseError) and "maxmemory" in str(error):
        return StoreError(f"{message}: give Redis more memory")
    if isinstance(error, errors.BusyLoadingError):
        return StoreError(f"{message}: it answers when it has read its file")
    return StoreError(f"{message}: start Redis, or check the address")


def _parts(writes: Sequence[Write]) -> Iterator[list[Write]]:
    """Yield the writes of one script after another; those of a user are never divided."""
    part: list[Write] = []
    size = 0
    for write in writes:
        part.append(write)
        size += len(write[1])
        if size >= SCRIPT_EVENTS:
            yield part
            part, size = [], 0
    if part:
        yield part


def _key(user: bytes) -> bytes:
    return PREFIX + b"user:" + user


def _member(event: Event) -> bytes:
    return event.time.to_bytes(6, "big") + len(event.item).to_bytes(2, "big") + event.item + event.kind


def _event(member: bytes) -> Event:
    end = 8 + int.from_bytes(member[6:8], "big")
    return Event(member[8:end], int.from_bytes(member[:6], "big"), member[end:])
