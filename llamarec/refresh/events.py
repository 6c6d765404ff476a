"""Appends new events to a copy of the earlier data, and chooses the users whose newest event judges the candidate."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from preprocessing.append import Previous, load_previous
from preprocessing.artifacts import file_fingerprint, read_manifest
from preprocessing.catalogue import ITEMS_FILE, Catalogue
from preprocessing.data import Data
from preprocessing.errors import InputError
from preprocessing.preprocess import AddedTitles, Preprocessing, preprocess
from preprocessing.report import ReadingLog
from preprocessing.sources import raw_files
from preprocessing.times import ORDINAL
from stores.address import open_store
from stores.loading import milliseconds, read_events
from stores.store import Listing, Store

SNAPSHOT = "events.parquet"
"""File of the events that were taken from a store, within the folder of a candidate."""
COLUMNS = ("user", "item", "timestamp", "title")
KEYS = pa.schema({"user": pa.string(), "item": pa.string(), "time": pa.int64()})
"""Columns of an event; times in milliseconds since 1970, or numbers that only order the events."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where new events come from."""

    events: Path | None = None
    """File or folder of further events, as `llamarec preprocess --append` reads them; if absent, they are the events
    of the store that the earlier data lacks."""
    store: str | None = None
    """Address of the store of histories. It also gives the titles of the items that were added to it, and says which
    items are hidden."""
    dataset: str = "table"
    """Kind of the file, a key of :data:`preprocessing.sources.SOURCES`."""
    user_column: str | None = None
    """Name of a ``table``'s column of user ids. Default, for all four: what the earlier data was read with."""
    item_column: str | None = None
    timestamp_column: str | None = None
    title_column: str | None = None
    delimiter: str | None = None
    """Separator of a ``table``'s text files; see :class:`preprocessing.preprocess.Preprocessing`."""
    skip_bad_lines: bool = False
    """Whether to skip and count rows that cannot be used, instead of stopping at the first."""
    scheduler_address: str | None = None
    """Address of the scheduler of a Dask cluster."""

    def __post_init__(self) -> None:
        if self.events is None and self.store is None:
            raise InputError("there are no new events: give a file with --events, or the address of a store")

    @property
    def name(self) -> str:
        """Name for messages: the file, or the store without what may be a password."""
        if self.events is not None:
            return str(self.events)
        assert self.store is not None
        scheme, _, rest = self.store.partition("://")
        return f"{scheme}://{rest.rpartition('@')[2]}"

    def fingerprint(self) -> str:
        """Return a hash of the files' content, or the store's name: its events change all the time.

        Raises:
            InputError: there are no such files.
        """
        if self.events is None:
            return self.name
        if not self.events.exists():
            raise InputError(f"{self.events} does not exist: name a file or folder of new events with --events")
        return " ".join(file_fingerprint(path) for path in raw_files(self.dataset, self.events))


def append_events(source: Source, earlier: Path, work: Path) -> None:
    """Write ``work/data``: the earlier data with the new events. Data that has them already is left as it is.

    Args:
        source: see :class:`Source`.
        earlier: artifacts that the serving release was built from.
        work: folder of the candidate.

    Raises:
        InputError: the events cannot be read, there are none, or they are of another data set.
        StoreError: the store cannot be reached.
    """
    before = read_manifest(earlier / "data", "data", "llamarec preprocess")
    if (work / "data").is_dir():
        if read_manifest(work / "data", "data", "llamarec refresh").inputs != before.inputs:
            return
    else:
        partial = work / ".data.copy"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(earlier / "data", partial)
        os.rename(partial, work / "data")
    added, raw = None, source.events
    if source.store is not None:
        with closing(open_store(source.store)) as store:
            added = _added_titles(store)
            if raw is None:
                raw = work / SNAPSHOT
                _check_dataset(source, added.dataset, before.options["name"])
                _write_snapshot(store, source, earlier, raw)
    from_file = source.events is not None
    options = Preprocessing(
        dataset=source.dataset if from_file else "table",
        raw=raw,
        skip_bad_lines=source.skip_bad_lines,
        scheduler_address=source.scheduler_address,
        append=True,
        **(_table(source, before.options) if from_file else {}),
    )
    preprocess(options, work, added)


def _table(source: Source, before: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns and the separator of a table: given ones, or those of the earlier data if it was one too."""
    recorded = before.get("columns", {}) if before.get("dataset") == "table" else {}
    found = {name: getattr(source, f"{name}_column") or recorded.get(name, name) for name in COLUMNS}
    columns = {f"{name}_column": column for name, column in found.items()}
    return {**columns, "delimiter": source.delimiter or recorded.get("delimiter")}


def store_listing(source: Source) -> Listing | None:
    """Return the added and hidden items of the store; None without a store.

    Raises:
        StoreError: the store cannot be reached.
    """
    if source.store is None:
        return None
    with closing(open_store(source.store)) as store:
        return store.listing()


def _added_titles(store: Store) -> AddedTitles:
    listing = store.listing()
    assert listing is not None  # no revision is known
    return AddedTitles({item.decode(): title for item, title in listing.added}, store.dataset())


def _check_dataset(source: Source, found: str | None, expected: str) -> None:
    if found not in (None, expected):
        raise InputError(f"{source.name} has the events of data set {found!r}, not of {expected!r}: name another store")


def _write_snapshot(store: Store, source: Source, earlier: Path, path: Path) -> None:
    """Write the store's events that the earlier data lacks, as a table.

    Raises:
        InputError: there are none.
    """
    users: list[str] = []
    items: list[str] = []
    times: list[int] = []
    for user in store.users():
        for item, time in dict.fromkeys((event.item, event.time) for event in store.last(user)):
            users.append(user.decode())
            items.append(item.decode())
            times.append(time)
    found = pa.table({"user": pa.array(users, pa.string()), "item": pa.array(items, pa.string()), "time": times})
    found = found.cast(KEYS)
    for part in _parts(earlier):
        found = found.join(part, KEYS.names, join_type="left anti")
    if not len(found):
        raise InputError(f"{source.name} has no events that {earlier} does not have: there is nothing to refresh with")
    stamps = found["time"]
    if _kind(load_previous(earlier / "data")) != ORDINAL:  # else the store keeps them as the numbers that they are
        stamps = stamps.cast(pa.timestamp("ms", tz="UTC"))
    titles = pa.nulls(len(found), pa.string())
    columns = {"user": found["user"], "item": found["item"], "timestamp": stamps, "title": titles}
    pq.write_table(pa.table(columns).sort_by([(name, "ascending") for name in COLUMNS[:3]]), path)


def _kind(previous: Previous) -> str | None:
    return None if previous.times is None else str(previous.times["kind"])


def _parts(artifacts: Path) -> Iterator[pa.Table]:
    """Yield all events of a data set."""
    for part in read_events(artifacts, None, ReadingLog(skip=True)).parts:
        columns = [part.rows["user"].cast(pa.string()), part.rows["item"].cast(pa.string()), milliseconds(part)]
        yield pa.table(columns, schema=KEYS)


@dataclass(frozen=True)
class NewEvents:
    """The events that the earlier data lacks, as far as they follow all that it has of their user."""

    count: int
    """Number of such events, also of items without a title."""
    judged: list[int]
    """Index, in the longer data, of every user whose last item comes from one of them: no model was trained on it."""


def new_events(source: Source, earlier: Path, work: Path, data: Data) -> NewEvents:
    """Return the new events of the longer data in a candidate's folder.

    Args:
        source: where they came from, for the message.
        earlier: artifacts without them.
        work: artifacts with them.
        data: the data set in ``work``.

    Raises:
        InputError: neither a user nor an item of any new event is known.
    """
    last = _last_times(earlier)
    later = pa.concat_tables([_later(part, last) for part in _parts(work)])
    known = Catalogue.load(earlier / "data" / ITEMS_FILE)
    items = pc.unique(later["item"]).to_pylist()
    users = pc.is_in(later["user"], last["user"].combine_chunks())
    if len(later) and not pc.any(users).as_py() and all(known.number(item.encode()) is None for item in items):
        raise InputError(
            f"the events of {source.name} are not of data set {data.name}: {earlier} knows none of their users, and"
            f" none of their {len(items):,} items; name the events of the same service"
        )
    pairs = set(zip(later["user"].to_pylist(), later["item"].to_pylist(), strict=True))
    held_out = [data.catalogue.raw(int(item)).decode() for item in data.test]
    judged = [user for user, pair in enumerate(zip(data.users, held_out, strict=True)) if pair in pairs]
    return NewEvents(len(later), judged)


def _last_times(artifacts: Path) -> pa.Table:
    """Return the time of each user's last event, as ``user`` and ``last``."""

    def latest(rows: pa.Table, time: str) -> pa.Table:
        return (
            rows.group_by("user")
            .aggregate([(time, "max")])
            .select(["user", f"{time}_max"])
            .rename_columns(["user", "last"])
        )

    return latest(pa.concat_tables([latest(part, "time") for part in _parts(artifacts)]), "last")


def _later(part: pa.Table, last: pa.Table) -> pa.Table:
    """Return the events after the last one of their user, and those of users who have none."""
    joined = part.join(last, "user", join_type="left outer")
    return joined.filter(pc.or_kleene(pc.is_null(joined["last"]), pc.greater(joined["time"], joined["last"])))
