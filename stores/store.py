"""The interface of a store, its errors, and the order of events that every store keeps."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

SCHEMA = 1
"""Version of the layout of a store; a store of another version is refused."""
KEEP = 1_000
"""Default number of events that are kept for a user."""
MAX_TIME = 2**48 - 1
"""Latest time that a store can keep, in milliseconds: in the year 10889."""
VIEW = b"view"
"""Kind of an event that names none."""


class Event(NamedTuple):
    """One thing that a user did; two equal events are the same one."""

    item: bytes
    """Raw item id, whether or not a catalogue knows it."""
    time: int
    """Milliseconds since 1970, UTC."""
    kind: bytes = VIEW
    """What was done, for example ``view`` or ``purchase``."""


class AddedItem(NamedTuple):
    """An item that was added while servers run."""

    item: bytes
    """Raw item id."""
    title: str


class Listing(NamedTuple):
    """The items that were added and hidden while servers run."""

    revision: int
    added: tuple[AddedItem, ...]
    hidden: frozenset[bytes]


Write = tuple[bytes, Sequence[Event]]
"""A raw user id and events of this user, in any order."""


class StoreError(Exception):
    """A store cannot be used now; the message names the store, without its password, and the remedy."""


class WrongStoreError(StoreError):
    """A store is there, but it is not one for this server: of another data set or version, or no store at all."""


class Store(Protocol):
    """Histories of users; a user who is not known has an empty one.

    Every method raises :class:`StoreError` if the store cannot be reached. The next call tries again, so nothing has to
    be done when the store is back. An object serves one thread; any number of processes can use the same store.
    """

    name: str
    """Address of the store without its password, for messages."""

    def record(self, writes: Sequence[Write]) -> list[int]:
        """Keep events, and return for each write how many of its events were new.

        When it returns, the events survive the death of any process. An event that is older than all that are kept of a
        full history is not kept, and not new.
        """

    def last(self, user: bytes) -> list[Event]:
        """Return the kept events of a user, oldest first; see :func:`order`."""

    def forget(self, user: bytes) -> int:
        """Delete all events of a user, and return how many there were."""

    def merge(self, old: bytes, new: bytes) -> int:
        """Give the events of one user to another, forget the first, and return how many were new to the second."""

    def dataset(self) -> str | None:
        """Return the name of the data set whose items the events name; None if nobody has said it yet."""

    def listing(self, known: int | None = None) -> Listing | None:
        """Return the added and hidden items; None if the revision is still ``known``."""

    def close(self) -> None:
        """Close the connection."""


def order(event: Event) -> tuple[int, int, bytes, bytes]:
    """Return the sort key of a history: time, then item, then kind.

    Items of the same time are ordered by the length of their ids and then by their bytes, which for whole numbers is
    the order of preprocessing. So a history depends only on its events, and not on the order of their arrival.
    """
    return event.time, len(event.item), event.item, event.kind


def check_schema(name: str, found: int) -> None:
    """Check that a store's version is that of this program.

    Raises:
        WrongStoreError: it is not.
    """
    if found != SCHEMA:
        remedy = "install the llamarec that wrote it, or a newer one"
        raise WrongStoreError(f"the store {name} has version {found}, and this llamarec reads {SCHEMA}: {remedy}")


def check_dataset(name: str, found: str | None, expected: str) -> None:
    """Check that a store's data set is the one whose models are served.

    Raises:
        WrongStoreError: it is not.
    """
    if found != expected:
        raise WrongStoreError(
            f"the store {name} has the events of data set {found!r}, not of {expected!r}: name another store"
        )
