"""Raw interactions to checked Parquet in row groups that later become partitions, and the titles of the items."""

import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from preprocessing.errors import InputError

PARTITION_ROWS = 500_000
"""Rows of a row group, which is a partition of the workflows: what a worker holds at a time."""
MANY_PAIRS = 2_000_000
"""Pairs of item and title that are held before repetitions among them are dropped."""
LONGEST_TITLE = 1000
"""Characters of a title that are kept; a prompt shows far fewer."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
DAY = 86_400


class Raw(NamedTuple):
    """A data set as read, before any filter."""

    interactions: Path
    """Parquet with ``user``, ``item`` (integers when they are in the raw file, else strings) and ``timestamp``."""
    rows: int
    titles: dict[Any, str]
    """Title of each item that has one, by an id of the same type as in ``interactions``."""


class RawTables(NamedTuple):
    """What a source reads of its files, as it streams by."""

    interactions: Callable[[], Iterator[pa.Table]]
    """Starts over at each call; tables with ``user``, ``item``, ``timestamp``, and ``title`` if titles stand there."""
    titles: Callable[[], Iterator[pa.Table]] | None = None
    """Tables with ``item`` and ``title``."""
    clean: Callable[[str], str] = str
    """Makes a title as it is to stand in a prompt."""


def ingest(tables: RawTables, path: Path, named: str) -> Raw:
    """Checks everything once, as it streams by, and writes ``path``.

    Args:
        tables: what a source reads.
        path: the Parquet file to write.
        named: the raw files, for errors.

    Raises:
        InputError: there are no interactions, an id is missing, a timestamp is no number, negative or in the future, or
            no item has a title.
    """
    found = _Titles()
    try:
        rows = _write(_checked(tables.interactions(), pa.int64(), found, named), path)
    except _FractionError:  # not the first row perhaps, so all over again
        found = _Titles()
        rows = _write(_checked(tables.interactions(), pa.float64(), found, named), path)
    if not rows:
        raise InputError(f"{named}: there are no interactions; check that the download is complete")
    for table in tables.titles() if tables.titles else ():
        found.add(table)
    titles = found.cleaned(tables.clean)
    if not titles:
        raise InputError(f"{named}: no item has a title, and the ranker reads titles; give the file that holds them")
    return Raw(path, rows, titles)


def _write(tables: Iterator[pa.Table], path: Path) -> int:
    """Writes row groups of PARTITION_ROWS and returns the number of rows."""
    rows, waiting, writer = 0, [], None
    try:
        for table in tables:
            rows += len(table)
            waiting.append(table)
            writer = writer or pq.ParquetWriter(path, table.schema)
            if sum(map(len, waiting)) >= PARTITION_ROWS:
                held = pa.concat_tables(waiting)
                whole = len(held) // PARTITION_ROWS * PARTITION_ROWS
                writer.write_table(held.slice(0, whole), row_group_size=PARTITION_ROWS)
                waiting = [held.slice(whole)]
        if writer:
            writer.write_table(pa.concat_tables(waiting), row_group_size=PARTITION_ROWS)
    finally:
        if writer:
            writer.close()
    return rows


def plain_title(title: str) -> str:
    """A title on one line, without control characters, of bounded length."""
    return " ".join(_CONTROL.sub(" ", title[: 4 * LONGEST_TITLE]).split())[:LONGEST_TITLE]


class _Titles:
    """Distinct pairs of item and title; of an item with several titles the first in order stays."""

    def __init__(self) -> None:
        self._pairs: list[pa.Table] = []
        self._most = MANY_PAIRS

    def add(self, table: pa.Table) -> None:
        self._pairs.append(_distinct(table.select(["item", "title"]).filter(pc.is_valid(table["title"]))))
        if sum(map(len, self._pairs)) > self._most:
            self._pairs = [_distinct(pa.concat_tables(self._pairs))]
            self._most = max(MANY_PAIRS, 2 * len(self._pairs[0]))

    def cleaned(self, clean: Callable[[str], str]) -> dict[Any, str]:
        if not self._pairs:
            return {}
        table = _distinct(pa.concat_tables(self._pairs))
        best: dict[Any, str] = {}
        for item, raw in zip(table["item"].to_pylist(), table["title"].to_pylist(), strict=True):
            if item is None or not (title := plain_title(clean(raw))):
                continue
            if item not in best or title < best[item]:
                best[item] = title
        return best


def _distinct(pairs: pa.Table) -> pa.Table:
    return _decoded(pairs.group_by(["item", "title"]).aggregate([]))


def _decoded(table: pa.Table) -> pa.Table:
    columns = [
        column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
        for column in table.columns
    ]
    return pa.table(columns, names=table.column_names)


class _FractionError(Exception):
    """A timestamp is no whole number, so none of them is read as one."""


def _checked(batches: Iterator[pa.Table], kind: pa.DataType, titles: _Titles, named: str) -> Iterator[pa.Table]:
    start = missing = 0
    for table in batches:
        missing += sum(table[name].null_count for name in ("user", "item"))
        if "title" in table.column_names:
            titles.add(table)
        stamps = _numbers(table["timestamp"], kind, start, named)
        _check_range(stamps, start, named)
        start += len(table)
        yield pa.table([table["user"], table["item"], stamps], names=["user", "item", "timestamp"])
    if missing:
        raise InputError(f"{named}: {missing:,} interactions have no user or no item; remove these rows")


def _numbers(column: pa.ChunkedArray, kind: pa.DataType, start: int, named: str) -> pa.ChunkedArray:
    """Timestamps as int64 or float64; dates count in their own unit since 1970."""
    if column.null_count:
        row = pc.index(pc.is_null(column), True).as_py()
        raise InputError(f"{named}: interaction {start + row + 1:,} has no timestamp; remove this row")
    if pa.types.is_date32(column.type):
        column = column.cast(pa.int32())
    elif pa.types.is_temporal(column.type):
        column = column.cast(pa.int64())
    try:
        return column.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        values = enumerate(column.to_pylist(), start + 1)
        wrong = next(((row, value) for row, value in values if not _is_number(value)), None)
        if wrong is None and kind == pa.int64():
            raise _FractionError from None
        row, value = wrong or (start + 1, column[0].as_py())
        raise InputError(f"{named}: timestamp {value!r} of interaction {row:,} is not a number") from None


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _check_range(stamps: pa.ChunkedArray, start: int, named: str) -> None:
    """Neither before 1970 nor in the future, whether in seconds, milli-, micro- or nanoseconds."""
    limits = pc.min_max(stamps).as_py()
    if not len(stamps):
        return
    unit = next((unit for unit in (1, 10**3, 10**6, 10**9) if limits["max"] < 10**11 * unit), 10**9)
    for value, wrong, remedy in (
        (limits["min"], limits["min"] < 0, "is negative"),
        (limits["max"], limits["max"] > (time.time() + DAY) * unit, "lies in the future"),
    ):
        if wrong:
            row = start + pc.index(stamps, value).as_py() + 1
            raise InputError(f"{named}: timestamp {value} of interaction {row:,} {remedy}; mend or remove such rows")
