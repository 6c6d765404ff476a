"""The `events` model: records what users did in the store of histories."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np

from llamarec_client.contract import (
    CLOCK_TOLERANCE_MS,
    EVENT_USER,
    ITEM_ID,
    KIND,
    MAX_EVENTS,
    MAX_KIND_BYTES,
    NEW,
    TIMESTAMP,
)
from preprocessing.errors import InputError
from preprocessing.features import check_ids, is_utf8
from serving.contract import STORE_VARIABLE
from serving.histories import check_user
from serving.steps.step import Answer, Tensors
from stores.address import open_store
from stores.store import VIEW, Event, Store, StoreError, Write


@dataclass(frozen=True)
class EventsStep:
    """Records events, those of all requests of a batch in one commit: the wait for the disk is longer than the work."""

    store: Store | None

    @classmethod
    def open(cls, address: str | None) -> "EventsStep":
        """Return the step of the store at an address, which is opened when it is first needed.

        Raises:
            InputError: the address is not one of a store.
        """
        return cls(open_store(address) if address else None)

    def answer_all(self, requests: Sequence[Tensors]) -> list[Answer | Exception]:
        """Record the events of all valid requests, and return for each request how many were new, or its error."""
        now = time.time_ns() // 1_000_000
        writes = [_write_or_refusal(request, now) for request in requests]
        # A probe has no events: it tells whether this process answers, not whether the store does.
        pending = [write for write in writes if not isinstance(write, InputError) and write[1]]
        new: Iterator[int | StoreError]
        try:
            new = iter(self._record(pending))
        except StoreError as error:
            new = repeat(error)
        counts = [write if isinstance(write, InputError) else next(new) if write[1] else 0 for write in writes]
        return [count if isinstance(count, Exception) else {NEW: [count]} for count in counts]

    def facts(self, request: Tensors, answer: Answer, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the user, and the numbers of events and of new ones."""
        user = request[EVENT_USER][0].decode(errors="replace")
        return {"user": user, "events": len(request[ITEM_ID]), "new_events": int(np.asarray(answer[NEW])[0])}

    def _record(self, writes: Sequence[Write]) -> list[int]:
        if not writes:
            return []
        if self.store is None:
            raise StoreError(
                "the store of histories is not named: start the server with `llamarec serve --store URL` or"
                f" {STORE_VARIABLE}"
            )
        return self.store.record(writes)


def _write_or_refusal(request: Tensors, now: int) -> Write | InputError:
    try:
        return read_events(request, now)
    except InputError as error:
        return error


def read_events(request: Tensors, now: int) -> Write:
    """Return the user and the events of a request.

    Args:
        request: its tensors.
        now: this moment in milliseconds. Without TIMESTAMP, the events took place in the milliseconds up to it.

    Raises:
        InputError: a tensor exceeds a limit or does not fit the others; the message names it.
    """
    user, items = request[EVENT_USER][0], request[ITEM_ID].tolist()
    check_user(user)
    if len(items) > MAX_EVENTS:
        raise InputError(f"{ITEM_ID.name} holds {len(items):,} ids: record at most {MAX_EVENTS:,} events in a request")
    check_ids(ITEM_ID.name, items)
    times = request[TIMESTAMP].tolist() if TIMESTAMP in request else list(range(now + 1 - len(items), now + 1))
    kinds = request[KIND].tolist() if KIND in request else [VIEW] * len(items)
    for spec, values in ((TIMESTAMP, times), (KIND, kinds)):
        if len(values) != len(items):
            raise InputError(f"{spec.name} holds {len(values)} values for {len(items)} items: give one for each item")
    for place, moment in enumerate(times):
        if not 0 <= moment <= now + CLOCK_TOLERANCE_MS:
            when = "before 1970" if moment < 0 else f"{(moment - now) / 1000:,.0f} s ahead of the server's clock"
            raise InputError(
                f"{TIMESTAMP.name}[{place}] is {moment}, {when}: give milliseconds since 1970, UTC, of the past"
            )
    for place, kind in enumerate(kinds):
        if not 1 <= len(kind) <= MAX_KIND_BYTES or not is_utf8(kind):
            raise InputError(
                f"{KIND.name}[{place}] has {len(kind)} bytes: give 1 to {MAX_KIND_BYTES} bytes of UTF-8, such as 'view'"
            )
    return user, list(map(Event, items, times, kinds))
