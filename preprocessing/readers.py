"""Reads CSV, JSON lines and Parquet files of any size as streams of Arrow tables."""

import ast
import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from preprocessing.errors import InputError

BATCH_ROWS = 1_000_000
"""Number of rows that are read at once."""
CSV_BLOCK = 32 << 20
"""Number of bytes of a CSV file that are read at once, and the maximum length of a line."""


@dataclass
class BadLines:
    """Handler of lines that cannot be parsed: it skips and counts them, or stops at the first one."""

    skip: bool = False
    """Whether bad lines are skipped and counted."""
    counts: dict[str, int] = field(default_factory=dict)
    """Number of skipped lines by file."""

    def begin(self, path: Path) -> None:
        """Reset the count of a file, since a file may be read more than once."""
        self.counts.pop(str(path), None)

    def add(self, path: Path, line: int | None, what: str) -> None:
        """Count a bad line.

        Args:
            path: the file.
            line: number of the line, from 1; None if it is unknown.
            what: the problem, as the predicate of the error message's sentence.

        Raises:
            InputError: bad lines are not skipped.
        """
        if not self.skip:
            where = f"line {line:,}" if line else "a line"
            raise InputError(f"{path}: {where} {what}; fix the file or use --skip-bad-lines")
        self.counts[str(path)] = self.counts.get(str(path), 0) + 1


def open_text(path: Path) -> IO[str]:
    """Return an open UTF-8 text file, plain or ``.gz``."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def csv_batches(
    path: Path,
    columns: Mapping[str, str],
    bad: BadLines,
    *,
    names: list[str] | None = None,
    delimiter: str = ",",
    quoted: bool = True,
) -> Iterator[pa.Table]:
    """Yield columns of a CSV file as strings; an empty field is null.

    Args:
        path: the file, plain or ``.gz``.
        columns: names of the columns to read, and their new names.
        bad: handler of lines with too few or too many fields.
        names: names of all columns of a file without a header.
        delimiter: separator of the fields.
        quoted: whether fields may be enclosed in double quotes.

    Raises:
        InputError: the file is empty, truncated or not UTF-8, or lacks a column.
    """
    stopped: list[InputError] = []  # Arrow swallows exceptions of its handler

    def invalid(row: Any) -> str:
        try:
            bad.add(path, row.number, f"has {row.actual_columns} fields, not {row.expected_columns}")
        except InputError as error:
            stopped.append(error)
            return "error"
        return "skip"

    bad.begin(path)
    with readable(path, "a table"):
        header = names or _header(path, delimiter, quoted)
        check_columns(path, header, columns)
        options = (
            pyarrow.csv.ReadOptions(use_threads=False, block_size=CSV_BLOCK, column_names=names),
            pyarrow.csv.ParseOptions(
                delimiter=delimiter,
                quote_char='"' if quoted else False,
                newlines_in_values=quoted,
                invalid_row_handler=invalid,
            ),
            pyarrow.csv.ConvertOptions(
                column_types={name: pa.string() for name in header},
                include_columns=list(columns),
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
        source = pa.input_stream(str(path), compression="gzip" if path.suffix == ".gz" else None)
        try:
            for batch in pyarrow.csv.open_csv(source, *options):
                yield pa.table(batch.columns, names=list(columns.values()))
        except pa.ArrowInvalid:
            if stopped:
                raise stopped[0] from None
            raise


def parquet_batches(path: Path, columns: Mapping[str, str]) -> Iterator[pa.Table]:
    """Yield columns of a Parquet file with their types unchanged.

    Args:
        path: the file.
        columns: names of the columns to read, and their new names.

    Raises:
        InputError: the file is not Parquet, or lacks a column.
    """
    with readable(path, "Parquet"):
        file = pq.ParquetFile(path)
        check_columns(path, file.schema_arrow.names, columns)
        for batch in file.iter_batches(BATCH_ROWS, columns=list(columns)):
            yield pa.table([batch[name] for name in columns], names=list(columns.values()))


def json_batches(
    path: Path, columns: Mapping[str, Callable[[Mapping[str, Any]], Any]], bad: BadLines
) -> Iterator[pa.Table]:
    """Yield fields of JSON lines, or of Python literals as in Amazon's metadata of 2014, which are never executed.

    Args:
        path: the file, plain or ``.gz``.
        columns: for each column, a function that returns a line's value, which becomes a string.
        bad: handler of lines that are neither JSON nor a Python literal.

    Raises:
        InputError: the file is truncated or not UTF-8.
    """
    bad.begin(path)
    with readable(path, "text"), open_text(path) as file:
        rows = _objects(path, file, bad)
        while batch := list(islice(rows, BATCH_ROWS)):
            arrays = [
                pa.array([None if (value := take(row)) is None else str(value) for row in batch], pa.string())
                for take in columns.values()
            ]
            yield pa.table(arrays, names=list(columns))


def check_columns(path: Path, present: list[str], wanted: Iterable[str]) -> None:
    """Check that a file has the wanted columns.

    Raises:
        InputError: a wanted column is missing.
    """
    if absent := [name for name in wanted if name not in present]:
        raise InputError(f"{path} has no column {', '.join(absent)}: it has {', '.join(present)}")


def _objects(path: Path, file: IO[str], bad: BadLines) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(file, start=1):
        try:
            found = json.loads(line) if '"' in line[:3] else ast.literal_eval(line)
            found.keys()
        except (ValueError, SyntaxError, AttributeError, MemoryError, RecursionError):
            bad.add(path, number, "is neither JSON nor a Python literal")
            continue
        yield found


def _header(path: Path, delimiter: str, quoted: bool) -> list[str]:
    with open_text(path) as file:
        quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        header = next(csv.reader(file, delimiter=delimiter, quoting=quoting), None)
    if not header:
        raise InputError(f"{path} is empty; check that the download is complete")
    return header


@contextmanager
def readable(path: Path, what: str) -> Iterator[None]:
    """Turn the libraries' exceptions for a broken file into an error of one sentence.

    Args:
        path: the file that is read within the block.
        what: name of the expected format, for the error message.

    Raises:
        InputError: the file is empty or cannot be read.
    """
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty; check that the download is complete")
        yield
    except (UnicodeDecodeError, pa.ArrowException, EOFError, OSError, zlib.error, csv.Error) as error:
        if isinstance(error, UnicodeDecodeError) or "UTF8" in str(error):
            raise InputError(f"{path} is not UTF-8; convert it first") from None
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} cannot be read as {what} ({cause}); check that the download is complete") from None
