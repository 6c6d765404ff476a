"""Opens the store that an address names."""

from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from preprocessing.errors import InputError
from stores.store import KEEP, Store

FORMS = "sqlite:///FILE, redis://HOST:PORT/DATABASE or rediss://HOST:PORT/DATABASE"
MOST = 10_000
"""Largest number of events that a store keeps for a user: as many as a HISTORY may hold."""


def open_store(url: str, *, dataset: str | None = None) -> Store:
    """Return the store at an address; it connects when it is first used.

    Args:
        url: ``sqlite:///`` and the path of a file (``sqlite:////var/lib/x`` with four slashes is an absolute one),
            ``redis://`` or ``rediss://``; ``?keep=N`` keeps N events for a user.
        dataset: name of the data set whose items the events name.

    Raises:
        InputError: the address is not one of a store.
    """
    parts = urlsplit(url)
    given = parse_qs(parts.query, keep_blank_values=True)
    (keep,) = given.pop("keep", [str(KEEP)])[-1:]
    if not keep.isdecimal() or not 1 <= int(keep) <= MOST:
        raise InputError(f"keep={keep!r} in the store's address: give a number of events from 1 to {MOST:,}")
    if given:
        raise InputError(f"{'&'.join(given)} in the store's address: only keep=N can be given")
    if parts.scheme == "sqlite":
        if parts.netloc or not parts.path.strip("/"):
            raise InputError(f"{url!r} names no file: give sqlite:///FILE")
        from stores.sqlite import SqliteStore

        return SqliteStore(Path(unquote(parts.path[1:])), keep=int(keep), dataset=dataset)
    if parts.scheme not in ("redis", "rediss") or not parts.hostname:
        raise InputError(f"{_shown(url)} is not the address of a store: give {FORMS}")
    database = parts.path.strip("/")
    if database and not database.isdecimal():
        raise InputError(f"{database!r} in the store's address is no number of a database: give {FORMS}")
    try:
        from stores.redis import RedisStore
    except ModuleNotFoundError:
        raise InputError("a store in Redis needs redis-py: pip install 'llamarec[serve]'") from None
    return RedisStore(parts._replace(query="").geturl(), keep=int(keep), dataset=dataset)


def _shown(url: str) -> str:
    """Return an address for a message, without what may be a password."""
    return repr(f"{url.partition('://')[0]}://...") if "@" in url else repr(url)
