"""Writes checked interactions to Parquet in row groups that later become partitions, and collects titles."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from preprocessing.append import Previous
from preprocessing.errors import InputError
from preprocessing.group_column import GroupPairs
from preprocessing.report import ReadingLog
from preprocessing.times import DATED, ORDINAL, OUTSIDE, TimeUnit, shown_time, to_nanoseconds
from preprocessing.titles import prompt_title
from preprocessing.values import Batch, Interactions, check_interactions, check_titles

PARTITION_ROWS = 500_000
"""Number of rows in a row group, which becomes a partition of the workflows and is held by one worker at a time."""
MANY_PAIRS = 2_000_000
"""Number of pairs of item and title above which repeated pairs are dropped."""


class Raw(NamedTuple):
    """A data set as read, before any filter."""

    interactions: Path
    """Parquet file with ``user``, ``item`` (integers if they are integers in all raw files, otherwise strings) and
    ``timestamp`` (int64, or float64 if any has a fraction)."""
    rows: int
    """Number of interactions."""
    titles: dict[Any, str]
    """Title of each item that has one, by an id of the same type as in ``interactions``."""
    times: dict[str, Any]
    """How the times were read and are stored, for a later append and for the report."""
    several_titles: int
    """Number of items with several titles."""
    added: dict[str, str]
    """Those of the titles that came from a store of added items, by the raw ids."""
    groups: dict[Any, str]
    """Group of each item that has one, by an id of the same type as in ``interactions``."""


class RawTables(NamedTuple):
    """Streams of the batches in a source's files."""

    interactions: Iterator[Batch]
    """Batches with the columns ``user``, ``item``, ``timestamp`` and, if the same file holds the titles, ``title``, and
    if groups are wanted, ``group``."""
    titles: Iterator[Batch]
    """Batches with the columns ``item``, ``title`` and, if groups are wanted, ``group``, from files that hold nothing
    else."""
    natural: Callable[[str], str] = str
    """Function that puts the words of a title in order."""


def ingest(
    tables: RawTables,
    path: Path,
    named: str,
    log: ReadingLog,
    previous: Previous | None = None,
    added: Mapping[str, str] | None = None,
) -> Raw:
    """Check all interactions and titles in one pass, write the interactions, and return the data set.

    Args:
        tables: batches of the source.
        path: the Parquet file to write.
        named: names of the raw files, for error messages.
        log: record of what is read and left out.
        previous: an earlier data set that this one continues.
        added: titles, by raw ids, of items for which the raw files have none.

    Raises:
        InputError: there are no interactions, a row is bad and bad rows are not skipped, the times have no common unit,
            or no item has a title, or a group if groups are wanted.
    """
    titles, groups, units, parts = _Titles(), GroupPairs(), TimeUnit(log.skip), _Parts(path)
    try:
        if previous:
            for batch in previous.batches(log):
                parts.add(check_interactions(batch, units, log))
            units.settle(previous.times)
        for batch in tables.interactions:
            if "title" in batch.names:
                titles.add(check_titles(batch, log))
            groups.add(batch, log)
            parts.add(check_interactions(batch, units, log))
        if units.check_ordinals():
            parts.discard(ORDINAL)
            for file, count in units.ordinals.items():
                log.rows(file, -count)
                log.bad(file, lambda: "a line", OUTSIDE, count=count)
        if not parts.rows:
            raise InputError(f"{named}: no interactions found; check that the download is complete")
        for batch in tables.titles:
            titles.add(check_titles(batch, log))
            groups.add(batch, log)
        item_types = {*parts.types("item"), *titles.item_types(), _id_type(added or {})}
        item_type = pa.string() if pa.string() in item_types else pa.int64()
        times = {**units.facts(), **parts.range(units.kind)}
        rows = parts.join(item_type, units.kind)
    finally:
        parts.remove()
    best, several = titles.best(item_type, tables.natural, previous.titles() if previous else {}, log)
    key = str if item_type == pa.string() else int
    used = {item: title for item, title in (added or {}).items() if key(item) not in best}
    best.update({key(item): title for item, title in used.items()})
    if not best:
        raise InputError(f"{named}: no item has a title, but the ranker needs titles; provide the file with the titles")
    grouped = groups.by_item(item_type, previous.groups() if previous else {})
    if groups.wanted and not grouped:
        raise InputError(f"{named}: no item has a group; name a column with values as --group-column, or leave it out")
    return Raw(path, rows, best, times, several, used, grouped)


def _id_type(ids: Iterable[str]) -> pa.DataType:
    """Return the integer type if all ids are numbers in the one way in which integers are written, else text."""
    texts = pa.array(ids, pa.string())
    try:
        return pa.int64() if texts.cast(pa.int64()).cast(pa.string()).equals(texts) else pa.string()
    except pa.ArrowInvalid:
        return pa.string()


class _Writer:
    """A Parquet file that is written in row groups of PARTITION_ROWS rows."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema = path, schema
        self.rows = 0
        self._waiting: list[pa.Table] = []
        self._file = pq.ParquetWriter(path, schema)

    def write(self, batch: pa.RecordBatch) -> None:
        self.rows += len(batch)
        self._waiting.append(pa.Table.from_batches([batch]))
        if sum(map(len, self._waiting)) >= PARTITION_ROWS:
            held = pa.concat_tables(self._waiting)
            whole = len(held) // PARTITION_ROWS * PARTITION_ROWS
            self._file.write_table(held.slice(0, whole), row_group_size=PARTITION_ROWS)
            self._waiting = [held.slice(whole)]

    def close(self) -> None:
        if self._file.is_open:
            if self._waiting:
                self._file.write_table(pa.concat_tables(self._waiting), row_group_size=PARTITION_ROWS)
            self._file.close()


class _Part(NamedTuple):
    """Interactions of one kind of times and one combination of types."""

    kind: str
    writer: _Writer
    limits: list[Any]
    """First and last time."""


class _Parts:
    """Interactions in one file for each combination of types, since the types of all are known only at the end.

    Args:
        path: the file that they become.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._parts: dict[tuple[str, pa.Schema], _Part] = {}

    @property
    def rows(self) -> int:
        return sum(part.writer.rows for part in self._parts.values())

    def types(self, column: str) -> set[pa.DataType]:
        return {part.writer.schema.field(column).type for part in self._parts.values()}

    def add(self, interactions: Iterable[Interactions]) -> None:
        for kind, rows in interactions:
            limits = pc.min_max(rows["timestamp"]).as_py()
            part = self._parts.get((kind, rows.schema))
            if part is None:
                writer = _Writer(self._path.with_name(f"{self._path.name}.{len(self._parts)}"), rows.schema)
                part = self._parts[kind, rows.schema] = _Part(kind, writer, [limits["min"], limits["max"]])
            part.limits[:] = min(part.limits[0], limits["min"]), max(part.limits[1], limits["max"])
            part.writer.write(rows)

    def discard(self, kind: str) -> None:
        for key in [key for key, part in self._parts.items() if part.kind == kind]:
            part = self._parts.pop(key)
            part.writer.close()
            part.writer.path.unlink()

    def range(self, kind: str) -> dict[str, str]:
        """Return the first and the last time for a report."""
        low = min(_stored(part.limits[0], part.kind, kind) for part in self._parts.values())
        high = max(_stored(part.limits[1], part.kind, kind) for part in self._parts.values())
        return {"first": shown_time(low, kind), "last": shown_time(high, kind)}

    def join(self, item_type: pa.DataType, kind: str) -> int:
        """Make one file of all parts, with the times as ``kind``, and return its number of rows."""
        parts, rows = list(self._parts.values()), self.rows
        stamp = pa.float64() if pa.float64() in self.types("timestamp") and kind != DATED else pa.int64()
        user_type = pa.string() if pa.string() in self.types("user") else pa.int64()
        schema = pa.schema({"user": user_type, "item": item_type, "timestamp": stamp})
        for part in parts:
            part.writer.close()
        if len(parts) == 1 and parts[0].kind == kind and parts[0].writer.schema == schema:
            os.replace(parts[0].writer.path, self._path)
            return rows
        joined = _Writer(self._path, schema)
        for part in parts:
            for batch in pq.ParquetFile(part.writer.path).iter_batches(PARTITION_ROWS):
                stamps = _stored(batch["timestamp"], part.kind, kind)
                arrays = [batch["user"].cast(user_type), batch["item"].cast(item_type), stamps.cast(stamp)]
                joined.write(pa.RecordBatch.from_arrays(arrays, schema=schema))
        joined.close()
        return rows

    def remove(self) -> None:
        """Remove the parts, also after an error."""
        for part in self._parts.values():
            with suppress(OSError, pa.ArrowException):  # a file that could not be written cannot be closed either
                part.writer.close()
            part.writer.path.unlink(missing_ok=True)


def _stored(times: Any, kind: str, wanted: str) -> Any:
    """Return times of one kind as those of another: numbers with a unit become nanoseconds next to dated times."""
    if kind == wanted:
        return times
    if isinstance(times, pa.Array):
        return to_nanoseconds(times, kind)
    return to_nanoseconds(pa.array([times]), kind)[0].as_py()


class _Titles:
    """Distinct pairs of item and title; an item with several titles keeps the first in alphabetical order."""

    def __init__(self) -> None:
        self._pairs: list[pa.Table] = []
        self._most = MANY_PAIRS

    def add(self, rows: pa.RecordBatch) -> None:
        self._pairs.append(_distinct(pa.Table.from_batches([rows])))
        if sum(map(len, self._pairs)) > self._most:
            self._pairs = [self._all()]
            self._most = max(MANY_PAIRS, 2 * len(self._pairs[0]))

    def item_types(self) -> set[pa.DataType]:
        return {pairs.schema.field("item").type for pairs in self._pairs if len(pairs)}

    def best(
        self, item_type: pa.DataType, natural: Callable[[str], str], earlier: Mapping[str, str], log: ReadingLog
    ) -> tuple[dict[Any, str], int]:
        """Return the title of each item, and the number of items with several titles."""
        key = str if item_type == pa.string() else int
        best: dict[Any, str] = {key(item): title for item, title in earlier.items()}
        several = set()
        table = self._all()
        for item, raw in zip(table["item"].cast(item_type).to_pylist(), table["title"].to_pylist(), strict=True):
            title, problem = prompt_title(raw, natural)
            if problem:
                log.titles[problem] += 1
                continue
            if item in best and best[item] != title:
                several.add(item)
            best[item] = min(title, best.get(item, title))
        return best, len(several)

    def _all(self) -> pa.Table:
        types = self.item_types()
        if len(types) > 1:
            self._pairs = [
                pairs.set_column(0, "item", pairs["item"].cast(pa.string())) for pairs in self._pairs if len(pairs)
            ]
        empty = pa.table({"item": pa.array([], next(iter(types), pa.string())), "title": pa.array([], pa.string())})
        return _distinct(pa.concat_tables([pairs for pairs in self._pairs if len(pairs)] or [empty]))


def _distinct(pairs: pa.Table) -> pa.Table:
    return pairs.group_by(["item", "title"]).aggregate([]).select(["item", "title"])
