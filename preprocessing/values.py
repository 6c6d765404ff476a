"""Decides type, encoding and validity of every raw value, whatever file or format it came from.

A row is usable if its user id, item id and time are; titles are checked apart, as an item may have others.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from llamarec_client.contract import MAX_ID_BYTES
from preprocessing.errors import InputError
from preprocessing.features import is_utf8
from preprocessing.report import ReadingLog
from preprocessing.times import Example, Problem, Times, TimeUnit, is_text, read_times
from preprocessing.titles import prompt_title

NOT_UTF8 = "not UTF-8"
NOT_TEXT = "not text"
NOUNS = {"user": "user id", "item": "item id", "timestamp": "timestamp", "title": "title", "group": "group"}


class Batch(NamedTuple):
    """Rows of one file as they were read."""

    path: Path
    rows: pa.RecordBatch
    """Columns of any type, named ``user``, ``item``, ``timestamp`` and ``title``, or some of these."""
    place: Callable[[int], str]
    """Function that names a row of the batch, such as "line 3"."""
    names: dict[str, str]
    """Name of each column in the file."""
    kind: str | None = None
    """Kind of the times, if it is already known and the times need no more checks."""


class Interactions(NamedTuple):
    """Checked interactions whose times are of one kind."""

    kind: str
    """Kind of the times, see :mod:`preprocessing.times`."""
    rows: pa.RecordBatch
    """``user`` and ``item`` (int64 or string) and ``timestamp`` (int64 or float64), without nulls."""


def check_interactions(batch: Batch, units: TimeUnit, log: ReadingLog) -> Iterator[Interactions]:
    """Yield the usable interactions of a batch by the kind of their times, and count them.

    Args:
        batch: rows with ``user``, ``item`` and ``timestamp``.
        units: unit of the times so far.
        log: record of bad rows.

    Raises:
        InputError: a column has a type that is none of ids or times, the unit contradicts earlier rows, or a row is bad
            and bad rows are not skipped.
    """
    users, bad_users = read_ids(batch, "user")
    items, bad_items = read_ids(batch, "item")
    stamps = batch.rows["timestamp"]
    known: tuple[list[Times], list[Problem]] = ([Times(batch.kind, stamps, None)], []) if batch.kind else ([], [])
    times, bad_times = known if batch.kind else read_times(stamps, _named(batch, "timestamp"))
    usable = _usable(batch, [*bad_users, *bad_items, *bad_times], log)
    for kind, values, rows in times:
        found = pa.RecordBatch.from_arrays([users, items, values], names=["user", "item", "timestamp"])
        kept = rows if usable is None else usable if rows is None else pc.and_(rows, usable)
        if kept is not None:
            found = found.filter(kept)
        if not len(found):
            continue
        if kind not in units.examples:
            first = 0 if kept is None else pc.index(kept, True).as_py()
            units.examples[kind] = Example(str(batch.path), batch.place(first), found["timestamp"][0].as_py())
        units.add(kind, len(found), batch.path)
        log.rows(batch.path, len(found))
        yield Interactions(kind, found)


def check_titles(batch: Batch, log: ReadingLog) -> pa.RecordBatch:
    """Return the rows that have an item id and a title, as ``item`` and ``title``.

    Args:
        batch: rows with ``item`` and ``title``.
        log: record of dropped titles and, if the batch has no interactions, of bad rows.

    Raises:
        InputError: a column has a type that is none of ids or text, a title is not UTF-8 or an id is bad, and bad rows
            are not skipped.
    """
    items, bad_items = read_ids(batch, "item")
    if "user" not in batch.rows.schema.names:  # otherwise the interactions are checked, and tell
        usable = _usable(batch, bad_items, log)
        log.rows(batch.path, len(batch.rows) if usable is None else pc.sum(usable).as_py())
    titles = _titles(batch, log)
    found = pa.RecordBatch.from_arrays([items, titles], names=["item", "title"])
    wanted = titles.is_valid()
    for problem in bad_items:
        wanted = pc.and_not(wanted, problem.rows)
    return found if pc.all(wanted).as_py() else found.filter(wanted)


def check_items(batch: Batch, log: ReadingLog) -> list[tuple[str, str]]:
    """Return id and title of all usable rows; unlike in a data set, a row without a title is a bad one.

    Args:
        batch: rows with ``item`` and ``title``.
        log: record of bad rows.

    Raises:
        InputError: a column has a type that is none of ids or text, or a row is bad and bad rows are not skipped.
    """
    items, problems = read_ids(batch, "item")
    raw = _titles(batch, log)
    titles = [("", "") if title is None else prompt_title(title) for title in raw.to_pylist()]
    for what in dict.fromkeys(problem for _, problem in titles if problem):
        rows = pa.array([problem == what for _, problem in titles])
        problems.append(Problem(rows, f"a title that is {what}", raw))
    problems += _problem(raw.is_null(), "no title")
    usable = _usable(batch, problems, log)
    rows = zip(items.cast(pa.string()).to_pylist(), (title for title, _ in titles), strict=True)
    return list(rows if usable is None else compress(rows, usable.to_pylist()))


def read_ids(batch: Batch, name: str) -> tuple[pa.Array, list[Problem]]:
    """Return ids as int64 or string, and the rows that have no usable id.

    Raises:
        InputError: the type is not one of ids.
    """
    column, noun = batch.rows[name], NOUNS[name]
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    missing = [Problem(column.is_null(), f"no {noun}")] if column.null_count else []
    if pa.types.is_integer(column.type) or (pa.types.is_decimal(column.type) and column.type.scale == 0):
        try:
            return column.cast(pa.int64()), missing
        except pa.ArrowInvalid:  # an integer from 2^63 on
            return column.cast(pa.string()), missing
    if not is_text(column.type):
        raise InputError(f"{_named(batch, name)} has the type {column.type}; ids must be integers or text")
    text, unreadable = read_text(column)
    size = pc.binary_length(text)
    empty = pc.or_(pc.equal(size, 0), pc.utf8_is_space(text))
    return text, [
        *missing,
        *([unreadable._replace(what=f"{with_article(noun)} that is {NOT_UTF8}")] if unreadable else []),
        *_problem(empty, f"an empty {noun}"),
        *_problem(pc.greater(size, MAX_ID_BYTES), f"{with_article(noun)} of more than {MAX_ID_BYTES} bytes", text),
    ]


def read_text(column: pa.Array) -> tuple[pa.Array, Problem | None]:
    """Return text or bytes as ``string``, and the rows that are not UTF-8, which become null."""
    raw = column.cast(pa.binary())
    try:
        return raw.cast(pa.string()), None
    except pa.ArrowInvalid:
        values = raw.to_pylist()
    wrong = [value is not None and not is_utf8(value) for value in values]
    text = pa.array([None if bad else value for bad, value in zip(wrong, values, strict=True)], pa.string())
    return text, Problem(pa.array(wrong), NOT_UTF8, raw)


def json_text(name: str, value: Any) -> str | None:
    """Return a value of a JSON line as text; None for null and NaN.

    Args:
        name: what the value is: ``user``, ``item``, ``timestamp`` or ``title``.
        value: a value as :mod:`json` reads it.

    Raises:
        ValueError: it is a list, an object, a boolean, or an id with a decimal point, or it is not UTF-8.
    """
    if isinstance(value, str):
        if not value.isascii() and not _is_encodable(value):
            raise ValueError(NOT_UTF8)
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if type(value) is int or (type(value) is float and name not in ("user", "item")):
        return str(value)
    raise ValueError(NOT_TEXT)


def _titles(batch: Batch, log: ReadingLog) -> pa.Array:
    column = batch.rows["title"]
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_integer(column.type):
        return column.cast(pa.string())
    if not is_text(column.type):
        raise InputError(f"{_named(batch, 'title')} has the type {column.type}; titles must be text")
    text, unreadable = read_text(column)
    if unreadable:
        first = pc.index(unreadable.rows, True).as_py()
        if not log.skip:
            log.bad(batch.path, partial(batch.place, first), "a title that is not UTF-8", column[first].as_py())
        log.titles[NOT_UTF8] += pc.sum(unreadable.rows).as_py()
    return text


def _usable(batch: Batch, problems: list[Problem], log: ReadingLog) -> pa.Array | None:
    """Report bad rows, each once, and return the mask of the others; None if all rows are usable."""
    if not problems:
        return None
    first = {problem.what: pc.index(problem.rows, True).as_py() for problem in problems}
    usable = pa.repeat(pa.scalar(True), len(batch.rows))
    for problem in sorted(problems, key=lambda problem: first[problem.what]):
        row = first[problem.what]
        example = [] if problem.values is None else [problem.values[row].as_py()]
        count = pc.sum(pc.and_(problem.rows, usable)).as_py()
        if count:
            log.bad(batch.path, partial(batch.place, row), problem.what, *example, count=count)
        usable = pc.and_not(usable, problem.rows)
    return usable


def _problem(rows: pa.Array, what: str, values: pa.Array | None = None) -> list[Problem]:
    rows = rows.fill_null(False)
    return [Problem(rows, what, values)] if pc.any(rows).as_py() else []


def with_article(noun: str) -> str:
    """Return a noun with "a" or "an"."""
    return f"an {noun}" if noun[0] in "aei" else f"a {noun}"


def _named(batch: Batch, name: str) -> str:
    return f"{batch.path}: column {batch.names[name]}"


def _is_encodable(text: str) -> bool:
    """Return whether a text has no half of a surrogate pair, which JSON can express and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
