"""Where the users of a batch and their histories come from: a data artifact, or a store."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from llamarec_client.contract import MAX_HISTORY
from preprocessing.artifacts import read_manifest
from preprocessing.catalogue import ITEMS_FILE, Catalogue
from preprocessing.data import KIND, read_sequences
from stores.store import Store


class UserHistory(NamedTuple):
    """A user, and what a request for this user would send as HISTORY."""

    user: str
    """Raw user id."""
    history: list[str]
    """Raw item ids, oldest first."""


class Users(Protocol):
    """Users and their histories."""

    @property
    def source(self) -> str:
        """Name of where they come from; two of one name are the same, though a store has other histories later."""

    @property
    def dataset(self) -> str | None:
        """Name of the data set whose items the histories name; None if nobody has said it."""

    def __iter__(self) -> Iterator[UserHistory]:
        """Yield the users, always in the same order."""


class ArtifactUsers:
    """The users of a data artifact, in its order, each with all of the sequence: the validation and test items too.

    Args:
        artifacts: the data set's artifacts.

    Raises:
        InputError: there is no data artifact.
    """

    def __init__(self, artifacts: Path) -> None:
        self._folder = artifacts / "data"
        manifest = read_manifest(self._folder, KIND, "llamarec preprocess")
        self.source = f"data {manifest.fingerprint}"
        self.dataset: str = manifest.facts["dataset"]

    def __iter__(self) -> Iterator[UserHistory]:
        catalogue = Catalogue.load(self._folder / ITEMS_FILE)
        ids = ["", *(catalogue.raw(item).decode() for item in range(1, len(catalogue) + 1))]
        for table in read_sequences(self._folder):
            columns = (table[name].to_pylist() for name in ("user", "training", "validation", "test"))
            for user, training, validation, test in zip(*columns, strict=True):
                items = [*training, validation, test][-MAX_HISTORY:]
                yield UserHistory(user, [ids[item] for item in items])


class StoreUsers:
    """The users of a store, in the order of their ids' bytes, each with the kept events.

    Args:
        store: the store, which is read when its users are.

    Raises:
        StoreError: the store cannot be reached, or there is none.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        store.check_exists()  # first of all: other calls would make a store
        self._users = sorted(store.users())
        self.source = f"store {store.name}"
        self.dataset = store.dataset()

    def __iter__(self) -> Iterator[UserHistory]:
        for user in self._users:
            if events := self._store.last(user):  # none if the user was forgotten just now
                yield UserHistory(user.decode(), [event.item.decode() for event in events])
