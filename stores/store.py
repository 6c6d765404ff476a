"""The interface of a store, its errors, and the order of events that every store keeps."""

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

SCHEMA = 2
"""Version of the layout of a store; a store of another version is refused. Version 1 has no added or hidden items."""
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


Write = tuple[bytes, Sequence[Event]]
"""A raw user id and events of this user, in any order."""


class AddedItem(NamedTuple):
    """An item that was added after the models were trained."""

    item: bytes
    """Raw item id."""
    title: str
    """Title as :func:`preprocessing.titles.prompt_title` returns it."""


class Listing(NamedTuple):
    """The items that were added and hidden while servers run."""

    revision: int
    """Number that changes with every change of the listing, and is 0 for a store that never had one."""
    added: tuple[AddedItem, ...]
    """Added items in the order in which they were first added. Their places never change."""
    hidden: frozenset[bytes]
    """Raw ids of hidden items, which need not be known."""


class StoreError(Exception):
    """A store cannot be used now; the message names the store, without its password, and the remedy."""


class WrongStoreError(StoreError):
    """A store is there, but it is not one for this server: of another data set or version, or no store at all."""


class Store(Protocol):
    """Histories of users, and the items that were added and hidden; a user who is not known has an empty history.

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

    def users(self) -> Iterator[bytes]:
        """Yield the raw id of every user with events, each once; those who come or go meanwhile may be left out."""

    def forget(self, user: bytes) -> int:
        """Delete all events of a user, and return how many there were."""

    def merge(self, old: bytes, new: bytes) -> int:
        """Give the events of one user to another, forget the first, and return how many were new to the second."""

    def listing(self, known: int | None = None) -> Listing | None:
        """Return the added and hidden items; None if the revision is still `known`, which takes one small read."""

    def add_items(self, items: Sequence[AddedItem]) -> int:
        """Add items or change their titles, and return how many were new or have another title.

        All of them are added at once. An item keeps the place that it was first given; of several titles for one item,
        the last one counts.
        """

    def hide(self, items: Sequence[bytes]) -> int:
        """Hide items from all answers, and return how many were not hidden. Ids that nobody knows may be hidden too."""

    def show(self, items: Sequence[bytes]) -> int:
        """Show hidden items again, and return how many were hidden."""

    def migrate(self) -> tuple[int, int]:
        """Bring a store of an older version to this program's, and return the versions before and after.

        Histories are not changed. A migration that is killed has changed nothing, and one of a current store does
        nothing.

        Raises:
            StoreError: there is no store.
            WrongStoreError: the store is of a newer version, or something else is at its address.
        """

    def check_exists(self) -> None:
        """Check that there is a store; the other methods make one where there is none.

        Raises:
            StoreError: there is none.
        """

    def dataset(self) -> str | None:
        """Return the name of the data set whose items the events name; None if nobody has said it yet."""

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
    check_not_newer(name, found)
    if found < SCHEMA:
        raise WrongStoreError(f"{_versions(name, found)}: run `llamarec users migrate --store URL`")


def check_not_newer(name: str, found: int) -> None:
    """Check that a store's version is one that this program knows.

    Raises:
        WrongStoreError: it is newer.
    """
    if found > SCHEMA:
        raise WrongStoreError(f"{_versions(name, found)}: install the llamarec that wrote it, or a newer one")


def _versions(name: str, found: int) -> str:
    return f"the store {name} has version {found}, and this llamarec reads {SCHEMA}"


def new_revision() -> int:
    """Return a revision for a listing that changes now: the time in milliseconds since 1970.

    A change takes this or the last revision plus one, whichever is larger. So a store that was replaced by a backup, or
    lost, does not come back to a revision that a server already knows for other content.
    """
    return time.time_ns() // 1_000_000


def check_dataset(name: str, found: str | None, expected: str) -> None:
    """Check that a store's data set is the one whose models are served.

    Raises:
        WrongStoreError: it is not.
    """
    if found != expected:
        raise WrongStoreError(
            f"the store {name} has the events of data set {found!r}, not of {expected!r}: name another store"
        )
