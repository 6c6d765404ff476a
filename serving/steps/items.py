"""The `items` model: adds, hides and shows items in the store, for whoever has the admin key."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from reprlib import repr as short
from typing import Any, NamedTuple

import numpy as np

from llamarec_client.contract import (
    ACTION,
    ADD,
    CHANGED,
    HIDE,
    ITEM_ID,
    KEY,
    MAX_ID_BYTES,
    MAX_ITEMS,
    MAX_TITLE_BYTES,
    SHOW,
    TITLE,
)
from preprocessing.errors import InputError
from preprocessing.features import check_ids, is_utf8
from preprocessing.titles import prompt_title
from serving.admin_key import KEY_VARIABLE, is_key
from serving.contract import PROBE, STORE_VARIABLE
from serving.steps.step import Answer, Tensors
from stores.address import open_store
from stores.store import AddedItem, Store, StoreError


class Change(NamedTuple):
    """What a request wants to be changed."""

    action: str
    """``add``, ``hide`` or ``show``."""
    items: list[bytes]
    titles: list[str]
    """One for each item to add, on one line; none for the other actions."""


@dataclass(frozen=True)
class ItemsStep:
    """Changes which items a server knows and shows."""

    store: Store | None
    key_digest: str | None = field(repr=False)
    """See :func:`serving.admin_key.known_digest`; None if the server has no admin key."""

    @classmethod
    def open(cls, address: str | None, key_digest: str | None) -> "ItemsStep":
        """Return the step of the store at an address, which is opened when it is first needed.

        Raises:
            InputError: the address is not one of a store.
        """
        return cls(open_store(address) if address else None, key_digest)

    def answer(self, request: Tensors) -> Answer:
        """Change the items of a request, and return how many of them were not so before.

        Raises:
            InputError: the key is wrong, or a tensor exceeds a limit or does not fit the others.
            StoreError: there is no store, or it cannot be reached.
        """
        if _is_probe(request):
            return {CHANGED: [0]}
        self._check_key(request[KEY][0])
        change = read_items(request)
        return {CHANGED: [self._apply(change) if change.items else 0]}

    def facts(self, request: Tensors, answer: Answer, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the action, and the numbers of items and of changed ones."""
        action = request[ACTION][0].decode(errors="replace")
        return {"action": action, "items": len(request[ITEM_ID]), "changed": int(np.asarray(answer[CHANGED])[0])}

    def _check_key(self, given: bytes) -> None:
        if self.key_digest is None:
            raise InputError(
                f"this server has no admin key, without which nobody may change items: set {KEY_VARIABLE} in its"
                " environment, or start it with `llamarec serve`"
            )
        if not is_key(given, self.key_digest):
            raise InputError(
                f"{KEY.name} is not the admin key of this server: send the one in {KEY_VARIABLE} or in .serve.json of"
                " its repository"
            )

    def _apply(self, change: Change) -> int:
        if self.store is None:
            raise StoreError(
                f"the store of items is not named: start the server with `llamarec serve --store URL` or"
                f" {STORE_VARIABLE}"
            )
        if change.action == ADD:
            return self.store.add_items(list(map(AddedItem, change.items, change.titles)))
        return self.store.hide(change.items) if change.action == HIDE else self.store.show(change.items)


def _is_probe(request: Tensors) -> bool:
    """Return whether this is the watch's probe, which asks whether this process answers; it has no key."""
    return len(request[ITEM_ID]) == 0 and request[KEY][0] == PROBE.encode()


def read_items(request: Tensors) -> Change:
    """Return what a request wants to be changed; its key was checked before.

    Raises:
        InputError: a tensor exceeds a limit or does not fit the others; the message names it.
    """
    action, items = request[ACTION][0].decode(errors="replace"), request[ITEM_ID].tolist()
    if action not in (ADD, HIDE, SHOW):
        raise InputError(f"{ACTION.name} is {short(action)}: give {ADD!r}, {HIDE!r} or {SHOW!r}")
    if len(items) > MAX_ITEMS:
        raise InputError(f"{ITEM_ID.name} holds {len(items):,} ids: change at most {MAX_ITEMS:,} items in a request")
    check_ids(ITEM_ID.name, items)
    if b"" in items:
        raise InputError(f"{ITEM_ID.name}[{items.index(b'')}] has 0 bytes: an item id has 1 to {MAX_ID_BYTES}")
    if action == ADD:
        return Change(action, items, _read_titles(request, len(items)))
    if TITLE in request:
        raise InputError(f"{TITLE.name} is given to {action!r} items: only {ADD!r} takes titles")
    return Change(action, items, [])


def _read_titles(request: Tensors, count: int) -> list[str]:
    """Return the titles of ``count`` items, cleaned as preprocessing cleans those of the catalogue.

    Raises:
        InputError: there are more or fewer, or one cannot stand in a prompt.
    """
    if TITLE not in request:
        raise InputError(f"{TITLE.name} is missing: {ADD!r} needs a title for each item")
    given: Sequence[bytes] = request[TITLE].tolist()
    if len(given) != count:
        raise InputError(f"{TITLE.name} holds {len(given)} values for {count} items: give one for each item")
    titles = []
    for place, raw in enumerate(given):
        if not 1 <= len(raw) <= MAX_TITLE_BYTES or not is_utf8(raw):
            raise InputError(
                f"{TITLE.name}[{place}] has {len(raw)} bytes: give 1 to {MAX_TITLE_BYTES:,} bytes of UTF-8"
            )
        title, problem = prompt_title(raw.decode())
        if problem:
            raise InputError(f"{TITLE.name}[{place}] is {problem}: give words that describe the item")
        titles.append(title)
    return titles
