"""Reads CSV, JSON lines, Parquet and the text files of MovieLens, of any size, as streams of batches.

Readers know formats, not values: what a value means and whether it is usable is decided in
:mod:`preprocessing.values`.
"""

import ast
import csv
import json
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from preprocessing.errors import InputError
from preprocessing.files import format_of, open_bytes, open_text
from preprocessing.report import ReadingLog
from preprocessing.values import NOUNS, Batch, json_text, with_article

BATCH_ROWS = 1_000_000
"""Number of rows that are read at once."""
CSV_BLOCK = 32 << 20
"""Number of bytes of a CSV file that are read at once, and the maximum length of a line."""
NO_KEYS: Mapping[str, str | None] = {}


def csv_batches(
    path: Path,
    columns: Mapping[str, str],
    log: ReadingLog,
    *,
    names: list[str] | None = None,
    delimiter: str = ",",
    quoted: bool = True,
    keys: Mapping[str, str | None] = NO_KEYS,
) -> Iterator[Batch]:
    """Yield columns of a CSV file as strings; an empty field is null.

    Args:
        path: the file, plain or compressed.
        columns: names of the columns to read, and their new names.
        log: record of lines with too few or too many fields.
        names: names of all columns of a file without a header.
        delimiter: separator of the fields.
        quoted: whether fields may be enclosed in double quotes.
        keys: values of the columns that are in the file's path instead.

    Raises:
        InputError: the file is empty, truncated or not UTF-8, or lacks a column.
    """
    stopped: list[InputError] = []  # Arrow swallows exceptions of its handler
    skipped: list[int] = []
    record_line = partial(_line_of_record, path, delimiter, quoted)

    def invalid(row: Any) -> str:
        problem = f"{row.actual_columns} fields, not {row.expected_columns}"
        try:
            log.bad(path, lambda: record_line(row.number), problem)
        except InputError as error:
            stopped.append(error)
            return "error"
        skipped.append(row.number)
        return "skip"

    with readable(path, "a table"):
        log.begin(path, format_of(path))
        header = names or _header(path, delimiter, quoted)
        in_file, constant = _located(path, header, columns, keys)
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
                include_columns=list(in_file),
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
        read = 0 if names else 1

        def place(before: int, row: int) -> str:
            """Name a row; Arrow counts records from 1, with the header and the skipped ones."""
            number = before + row + 1
            for left_out in skipped:
                number += left_out <= number
            return record_line(number)

        try:
            for batch in pyarrow.csv.open_csv(open_bytes(path), *options):
                yield _batch(path, batch.columns, in_file, constant, partial(place, read))
                read += len(batch)
        except pa.ArrowInvalid:
            if stopped:
                raise stopped[0] from None
            raise


def parquet_batches(
    path: Path, columns: Mapping[str, str], log: ReadingLog, *, keys: Mapping[str, str | None] = NO_KEYS
) -> Iterator[Batch]:
    """Yield columns of a Parquet file with their types unchanged.

    Args:
        path: the file.
        columns: names of the columns to read, and their new names.
        log: record of the file.
        keys: values of the columns that are in the file's path instead.

    Raises:
        InputError: the file is not Parquet, or lacks a column.
    """
    with readable(path, "Parquet"):
        log.begin(path, "Parquet")
        file = pq.ParquetFile(path)
        in_file, constant = _located(path, file.schema_arrow.names, columns, keys)
        read = 0
        for batch in file.iter_batches(BATCH_ROWS, columns=list(in_file)):
            arrays = [batch[name] for name in in_file]
            yield _batch(path, arrays, in_file, constant, partial(_row_after, read))
            read += len(batch)


def json_batches(
    path: Path, columns: Mapping[str, Callable[[Mapping[str, Any]], Any]], log: ReadingLog
) -> Iterator[Batch]:
    """Yield fields of JSON lines, or of Python literals as in Amazon's metadata of 2014, which are never executed.

    Blank lines are ignored.

    Args:
        path: the file, plain or compressed.
        columns: for each column, a function that returns a line's value, which becomes a string.
        log: record of lines that are neither JSON nor a Python literal, and of values that are not text.

    Raises:
        InputError: the file is truncated or not UTF-8.
    """
    with readable(path, "text"):
        log.begin(path, format_of(path))
        with open_text(path) as file:
            rows = _json_rows(path, file, columns, log)
            while batch := list(islice(rows, BATCH_ROWS)):
                numbers, *fields = zip(*batch, strict=True)
                arrays = [pa.array(values, pa.string()) for values in fields]
                yield _batch(path, arrays, {name: name for name in columns}, {}, partial(_line, array("q", numbers)))


def title_lines(
    path: Path,
    separator: str,
    fields: int,
    log: ReadingLog,
    group: Callable[[Sequence[str]], str | None] | None = None,
) -> Iterator[Batch]:
    """Yield the item and the title of lines such as ``item::title::genres``.

    Args:
        path: a text file of MovieLens, plain or compressed: UTF-8, or ISO-8859-1 as those of 100K and 1M are.
        separator: separator of the fields.
        fields: number of fields.
        log: record of lines with too few or too many fields.
        group: function that returns the group of a line's fields, if groups are wanted.

    Raises:
        InputError: the file is empty or truncated.
    """
    with readable(path, "text"):
        log.begin(path, format_of(path))
        content = open_bytes(path).read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("iso-8859-1")
    numbers, items, titles, groups = array("q"), [], [], []
    for number, line in enumerate(text.split("\n"), start=1):
        found = line.removesuffix("\r").split(separator)
        if not line.strip():
            continue
        if len(found) != fields:
            problem = f"{len(found)} fields separated by {separator!r}, not {fields}"
            log.bad(path, partial(_line, [number], 0), problem, line)
            continue
        numbers.append(number)
        items.append(found[0])
        titles.append(found[1])
        if group:
            groups.append(group(found))
    columns = {"item": items, "title": titles, **({"group": groups} if group else {})}
    arrays = [pa.array(values, pa.string()) for values in columns.values()]
    yield _batch(path, arrays, {name: name for name in columns}, {}, partial(_line, numbers))


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


def _located(
    path: Path, header: Sequence[str], columns: Mapping[str, str], keys: Mapping[str, str | None]
) -> tuple[dict[str, str], dict[str, tuple[str, str | None]]]:
    """Return the wanted columns that the file has, and name and value of those that only its folders' names have."""
    if absent := [name for name in columns if name not in header and name not in keys]:
        hint = "; set --delimiter if the separator is another" if len(header) == 1 else ""
        raise InputError(f"{path} has no column {', '.join(absent)}: it has {', '.join(header)}{hint}")
    if twice := next((name for name in columns if header.count(name) > 1), None):
        raise InputError(f"{path} has {header.count(twice)} columns named {twice}: rename all but one of them")
    in_file = {name: new for name, new in columns.items() if name in header}
    return in_file, {new: (name, keys[name]) for name, new in columns.items() if name not in in_file}


def _batch(
    path: Path,
    arrays: Sequence[pa.Array],
    in_file: Mapping[str, str],
    constant: Mapping[str, tuple[str, str | None]],
    place: Callable[[int], str],
) -> Batch:
    names = {new: name for name, new in in_file.items()} | {new: name for new, (name, _) in constant.items()}
    repeated = [pa.repeat(pa.scalar(value, pa.string()), len(arrays[0])) for _, value in constant.values()]
    return Batch(path, pa.RecordBatch.from_arrays([*arrays, *repeated], names=list(names)), place, names)


def _json_rows(
    path: Path, file: IO[str], columns: Mapping[str, Callable[[Mapping[str, Any]], Any]], log: ReadingLog
) -> Iterator[list[Any]]:
    """Yield the number of each usable line and its values as text."""
    for number, line in enumerate(file, start=1):
        if line.isspace():
            continue
        place = partial(_line, (number,), 0)
        try:
            found = json.loads(line) if '"' in line[:3] else ast.literal_eval(line)
            found.keys()
        except (ValueError, SyntaxError, AttributeError, MemoryError, RecursionError):
            log.bad(path, place, "neither a JSON object nor a Python literal of one")
            continue
        row: list[Any] = [number]
        for name, take in columns.items():
            value = take(found)
            try:
                row.append(json_text(name, value))
            except ValueError as error:
                if name != "title":
                    log.bad(path, place, f"{with_article(NOUNS[name])} that is {error}", value)
                    break
                log.titles[str(error)] += 1
                row.append(None)
        else:
            yield row


def _header(path: Path, delimiter: str, quoted: bool) -> list[str]:
    with open_text(path) as file:
        header = next(filter(None, csv.reader(file, delimiter=delimiter, quoting=_quoting(quoted))), None)
    if not header:
        raise InputError(f"{path} is empty; check that the download is complete")
    return header


def _quoting(quoted: bool) -> Literal[0, 3]:
    return csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE


def _line_of_record(path: Path, delimiter: str, quoted: bool, number: int) -> str:
    """Return the line on which a record of a CSV file begins; records are counted from 1, blank lines are not."""
    left, end = number, 0
    try:
        with open_text(path) as file:
            reader = csv.reader(file, delimiter=delimiter, quoting=_quoting(quoted))
            for record in reader:
                left -= bool(record)
                if not left:
                    return f"line {end + 1:,}"
                end = reader.line_num
    except csv.Error:  # a field that is longer than Python's reader allows
        pass
    return f"row {number:,}"


def _line(numbers: Sequence[int], row: int) -> str:
    return f"line {numbers[row]:,}"


def _row_after(before: int, row: int) -> str:
    return f"row {before + row + 1:,}"
