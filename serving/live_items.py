"""Keeps a step up to date with the items that are added and hidden while the server runs."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from serving.layout import exported_dataset
from stores.address import open_store
from stores.store import Listing, Store, StoreError

POLL_SECONDS = 0.5
"""Time in seconds after which the store is asked again whether its items changed."""
Made = TypeVar("Made")


def open_items(folder: Path, store: str | None) -> Store | None:
    """Return the store at an address for a step's exported folder; None without an address.

    Raises:
        InputError: the address is not one of a store.
    """
    return open_store(store, dataset=exported_dataset(folder)) if store else None


class LiveItems(Generic[Made]):
    """What a step makes of its exported files and of the store's items; made again when the store's items change.

    A step that was started while the store cannot be reached does not answer before it can: it would return items that
    were hidden. One that has read the items once goes on with them.

    Args:
        exported: what the exported files alone make.
        make: makes it of the added and hidden items too.
        store: where these are kept; None if the server has no store.
    """

    def __init__(self, exported: Made, make: Callable[[Listing], Made], store: Store | None = None) -> None:
        self._made, self._make, self._store = exported, make, store
        self._listing: Listing | None = None
        self._asked = -POLL_SECONDS

    def current(self, added: int = 0) -> Made:
        """Return what is made of the items as they were at most half a second ago.

        Args:
            added: number of added items that must be known: another step has them already.

        Raises:
            StoreError: the store cannot be reached, and has not been read or knows fewer items.
        """
        if self._store is None:
            return self._made
        known = self._listing is not None and len(self._listing.added) >= added
        if not known or time.monotonic() - self._asked >= POLL_SECONDS:
            self._ask(self._store, known=known)
        return self._made

    def _ask(self, store: Store, *, known: bool) -> None:
        self._asked = time.monotonic()
        try:
            found = store.listing(None if self._listing is None else self._listing.revision)
        except StoreError:
            if not known:
                raise
            return
        if found is not None:
            self._made = self._make(found)
            self._listing = found
