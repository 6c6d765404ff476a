"""Checks raw interactions, writes them to Parquet in row groups that later become partitions, and collects titles."""

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
"""Number of rows in a row group, which becomes a partition of the workflows and is held by one worker at a time."""
MANY_PAIRS = 2_000_000
"""Number of pairs of item and title above which repeated pairs are dropped."""
LONGEST_TITLE = 1000
"""Maximum number of characters in a title; prompts contain far fewer."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
DAY = 86_400


class Raw(NamedTuple):
    """A data set as read, before any filter."""

    interactions: Path
    """Parquet file with ``user``, ``item`` (integers if they are integers in the raw file, otherwise strings) and
    ``timestamp``."""
    rows: int
    """Number of interactions."""
    titles: dict[Any, str]
    """Title of each item that has one, by an id of the same type as in ``interactions``."""


class RawTables(NamedTuple):
    """Streams of the tables in a source's files."""

    interactions: Callable[[], Iterator[pa.Table]]
    """Function that reads from the beginning at each call. Its tables have the columns ``user``, ``item``,
    ``timestamp`` and, if the same file holds the titles, ``title``."""
    titles: Callable[[], Iterator[pa.Table]] | None = None
    """Function whose tables have the columns ``item`` and ``title``."""
    clean: Callable[[str], str] = str
    """Function that turns a raw title into the title for a prompt."""


def ingest(tables: RawTables, path: Path, named: str) -> Raw:
    """Check all interactions and titles in one pass, write the interactions, and return the data set.

    Args:
        tables: tables of the source.
        path: the Parquet file to write.
        named: names of the raw files, for error messages.

    Raises:
        InputError: there are no interactions, an id is missing, a timestamp is not a number, negative or in the future,
            or no item has a title.
    """
    found = _Titles()
    try:
        rows = _write(_checked(tables.interactions(), pa.int64(), found, named), path)
    except _FractionError:  # perhaps after the first row, so everything is read again
        found = _Titles()
        rows = _write(_checked(tables.interactions(), pa.float64(), found, named), path)
    if not rows:
        raise InputError(f"{named}: no interactions found; check that the download is complete")
    for table in tables.titles() if tables.titles else ():
        found.add(table)
    titles = found.cleaned(tables.clean)
    if not titles:
        raise InputError(f"{named}: no item has a title, but the ranker needs titles; provide the file with the titles")
    return Raw(path, rows, titles)


def _write(tables: Iterator[pa.Table], path: Path) -> int:
    """Write row groups of PARTITION_ROWS rows, and return the number of rows."""
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
    """Return the title on one line, without control characters, cut at :data:`LONGEST_TITLE` characters."""
    return " ".join(_CONTROL.sub(" ", title[: 4 * LONGEST_TITLE]).split())[:LONGEST_TITLE]


class _Titles:
    """Distinct pairs of item and title; an item with several titles keeps the first in alphabetical order."""

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
    """A timestamp is not a whole number, so all of them are read as floating-point numbers."""


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
    """Return timestamps as int64 or float64; dates become numbers of their own unit since 1970."""
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
    """Check that no timestamp is negative or in the future, whether in seconds, milli-, micro- or nanoseconds."""
    limits = pc.min_max(stamps).as_py()
    if not len(stamps):
        return
    unit = next((unit for unit in (1, 10**3, 10**6, 10**9) if limits["max"] < 10**11 * unit), 10**9)
    for value, wrong, problem in (
        (limits["min"], limits["min"] < 0, "is negative"),
        (limits["max"], limits["max"] > (time.time() + DAY) * unit, "is in the future"),
    ):
        if wrong:
            row = start + pc.index(stamps, value).as_py() + 1
            raise InputError(f"{named}: timestamp {value} of interaction {row:,} {problem}; fix or remove such rows")
