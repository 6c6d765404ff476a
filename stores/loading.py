"""Fills a store from a file of events, from the interactions of a preprocessed data set, or from a file of items."""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from preprocessing.append import load_previous
from preprocessing.errors import InputError
from preprocessing.report import ReadingLog
from preprocessing.sources import Layout, table_events, table_items
from preprocessing.times import ORDINAL, UNITS, TimeUnit, to_nanoseconds
from preprocessing.values import Batch, Interactions, check_interactions, check_items
from stores.address import open_store
from stores.store import VIEW, AddedItem, Event, Store, Write

COMMIT_EVENTS = 10_000
"""Number of events in a commit: enough that its wait for the disk does not count, and short for other writers."""
PAUSE_SECONDS = 0.002
"""Time in seconds between two commits, in which another writer gets its turn."""


@dataclass(frozen=True)
class Loaded:
    """What was loaded."""

    events: int
    """Number of events that were read."""
    new: int
    """Number of those that are kept and were not before."""
    skipped: int
    """Number of rows that were left out because they are not usable."""


def load_events(
    source: Path, url: str, layout: Layout | None = None, *, kind: str = VIEW.decode(), skip: bool = False
) -> Loaded:
    """Record all events of a file, or of a data set's artifacts, whose name a new store takes.

    Args:
        source: CSV or Parquet, a folder of such files, or the artifacts that `llamarec preprocess` wrote.
        url: address of the store.
        layout: columns of the files. Default: ``user``, ``item`` and ``timestamp``.
        kind: kind of the events.
        skip: whether to leave out rows that are not usable, instead of stopping at the first.

    Raises:
        InputError: there are no such files, or a row is not usable.
        StoreError: the store cannot be reached, or is of another data set.
    """
    log = ReadingLog(skip)
    dataset, parts = read_events(source, layout, log)
    store = open_store(url, dataset=dataset)
    try:
        events, new = _record_all(store, parts, kind.encode())
    finally:
        store.close()
    if not events:
        raise InputError(f"{source} has no events: check that it is complete")
    return Loaded(events, new, sum(log.skipped().values()))


class EventFiles(NamedTuple):
    """The events of a file or of a data set's artifacts."""

    dataset: str | None
    """Name of the data set; None for a file, which does not say it."""
    parts: Iterator[Interactions]


def read_events(source: Path, layout: Layout | None, log: ReadingLog) -> EventFiles:
    """Return the events of a file, or of a data set's artifacts; see :func:`load_events`.

    Args:
        source: see :func:`load_events`.
        layout: see :func:`load_events`.
        log: record of what is read, and whether unusable rows are skipped.

    Raises:
        InputError: there are no such files, or, while the parts are read, a row is not usable.
    """
    dataset, units = None, TimeUnit(log.skip)
    if (source / "data").is_dir():
        previous = load_previous(source / "data")
        dataset, batches = str(previous.manifest.facts["dataset"]), previous.batches(log)
    else:
        batches = table_events(source, layout or Layout(), log)
    return EventFiles(dataset, _checked(batches, units, log))


@dataclass(frozen=True)
class LoadedItems:
    """What was added."""

    items: int
    """Number of items that were read, each with a title."""
    changed: int
    """Number of those that were new or have another title now."""
    skipped: int
    """Number of rows that were left out because they are not usable."""


def load_items(source: Path, url: str, layout: Layout | None = None, *, skip: bool = False) -> LoadedItems:
    """Add all items of a file to a store at once, or none if one of them is not usable.

    Args:
        source: CSV or Parquet, or a folder of such files.
        url: address of the store.
        layout: columns of the files. Default: ``item`` and ``title``.
        skip: whether to leave out rows that are not usable, instead of stopping at the first.

    Raises:
        InputError: there are no such files, or a row is not usable.
        StoreError: the store cannot be reached.
    """
    log = ReadingLog(skip)
    batches = table_items(source, layout or Layout(), log)
    titles = {item: title for batch in batches for item, title in check_items(batch, log)}
    if not titles:
        raise InputError(f"{source} has no items: check that it is complete")
    with closing(open_store(url)) as store:
        changed = store.add_items([AddedItem(item.encode(), title) for item, title in titles.items()])
    return LoadedItems(len(titles), changed, sum(log.skipped().values()))


def _checked(batches: Iterator[Batch], units: TimeUnit, log: ReadingLog) -> Iterator[Interactions]:
    for batch in batches:
        yield from check_interactions(batch, units, log)


def _record_all(store: Store, interactions: Iterator[Interactions], kind: bytes) -> tuple[int, int]:
    """Return the numbers of events and of new ones."""
    events = new = 0
    writes: list[Write] = []
    waiting = 0
    for part in interactions:
        for write in _by_user(part, kind):
            writes.append(write)
            waiting += len(write[1])
            if waiting >= COMMIT_EVENTS:
                new += sum(store.record(writes))
                writes, waiting = [], 0
                time.sleep(PAUSE_SECONDS)
        events += len(part.rows)
    return events, new + sum(store.record(writes))


def _by_user(part: Interactions, kind: bytes) -> Iterator[Write]:
    """Yield the events of each user in a part of the data."""
    users, items = (part.rows[name].cast(pa.string()).cast(pa.binary()) for name in ("user", "item"))
    table = pa.table({"user": users, "item": items, "time": milliseconds(part)}).sort_by("user")
    rows = zip(*(table[name].to_pylist() for name in ("user", "item", "time")), strict=True)
    for user, own in groupby(rows, key=lambda row: row[0]):
        yield user, [Event(item, moment, kind) for _, item, moment in own]


def milliseconds(part: Interactions) -> pa.Array:
    """Return times in milliseconds; numbers in no unit, which only order events, are taken as they are."""
    times = part.rows["timestamp"]
    if part.kind == ORDINAL:
        return times.cast(pa.int64(), safe=False)
    if part.kind in UNITS:
        times = to_nanoseconds(times, part.kind)
    return pc.divide(times, UNITS["ns"] // UNITS["ms"])
