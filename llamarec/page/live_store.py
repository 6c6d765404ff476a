"""What visitors of the demo page change: their own histories, new items and hidden ones, in the server's store."""

import time
import uuid
from contextlib import closing

from preprocessing.errors import InputError
from preprocessing.titles import prompt_title
from serving.live_items import POLL_SECONDS
from stores.address import open_store
from stores.store import AddedItem, Listing, Store


class LiveStore:
    """The store of the page's server. Each call opens it, because the page answers in many threads.

    Args:
        url: address of the store.
        dataset: name of the data set that is served.
    """

    def __init__(self, url: str, dataset: str) -> None:
        self._url, self._dataset = url, dataset

    def listing(self, known: int | None = None) -> Listing | None:
        """Return the added and hidden items; None if the revision is still ``known``.

        Raises:
            StoreError: the store cannot be reached; so for all other methods.
        """
        with closing(self._open()) as store:
            return store.listing(known)

    def history(self, visitor: str) -> list[str]:
        """Return the raw ids of what a visitor took, oldest first."""
        with closing(self._open()) as store:
            return [event.item.decode() for event in store.last(visitor.encode())]

    def forget(self, visitor: str) -> None:
        """Delete what a visitor took."""
        with closing(self._open()) as store:
            store.forget(visitor.encode())

    def add_item(self, title: str) -> dict[str, str]:
        """Add an item under a new id, let the server learn of it, and return its id and its title as it is shown.

        Raises:
            InputError: the title cannot stand in a prompt.
        """
        title, problem = prompt_title(title)
        if problem:
            raise InputError(f"this title is {problem}: type words that describe the item")
        item = f"new-{uuid.uuid4().hex[:8]}"
        with closing(self._open()) as store:
            store.add_items([AddedItem(item.encode(), title)])
        time.sleep(POLL_SECONDS)
        return {"id": item, "title": title}

    def set_hidden(self, item: str, *, hidden: bool) -> None:
        """Hide an item or show it again, and let the server learn of it first."""
        with closing(self._open()) as store:
            (store.hide if hidden else store.show)([item.encode()])
        time.sleep(POLL_SECONDS)

    def hidden(self) -> list[str]:
        """Return the raw ids of hidden items, sorted."""
        listing = self.listing()
        return sorted(raw.decode() for raw in listing.hidden) if listing else []

    def _open(self) -> Store:
        return open_store(self._url, dataset=self._dataset)
