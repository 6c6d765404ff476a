"""Reads times of any type: Arrow's times and dates, ISO 8601 text, and numbers whose unit is found by their size.

A number is a time in seconds, milli-, micro- or nanoseconds if it lies between 1980 and 2100 in that unit; the four
ranges do not overlap. Numbers in none of them are ordinals or relative times. Dated times become nanoseconds.
"""

import time
from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from preprocessing.errors import InputError
from preprocessing.report import shortened

UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
"""Number of each unit in a second."""
NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
ORDINAL, DATED = "ordinal", "dated"
"""Kinds of times besides the units: numbers in no unit, and typed times and ISO 8601 text, in nanoseconds."""
FIRST, END = 315_532_800, 4_102_444_800
"""1980-01-01 and 2100-01-01 in seconds since 1970."""
DAY = 86_400
NO_TIME = "a timestamp that is neither a number nor an ISO 8601 time"
BEFORE_1970 = "a timestamp before 1970"
IN_THE_FUTURE = "a timestamp in the future"
OUTSIDE = "a timestamp outside 1980 to 2100, unlike the others"
_INTEGER = r"^[+-]?([0-9]{1,18}|[1-8][0-9]{18})$"
_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
_ISO = (
    "^(?P<year>[0-9]{4})-?(?P<month>0[1-9]|1[0-2])-?(?P<day>0[1-9]|[12][0-9]|3[01])"
    "(?:[Tt ](?P<hour>[01][0-9]|2[0-3])(?::?(?P<minute>[0-5][0-9])(?::?(?P<second>[0-5][0-9])"
    "(?:[.,](?P<fraction>[0-9]{1,9})[0-9]*)?)?)?"
    "(?: ?(?:Z|z|UTC|GMT|(?P<sign>[+-])(?P<zone_hour>[01][0-9]|2[0-3])(?::?(?P<zone_minute>[0-5][0-9]))?))?)?$"
)
_FIELDS = ("year", "month", "day", "hour", "minute", "second", "fraction", "sign", "zone_hour", "zone_minute")


class Problem(NamedTuple):
    """Rows that cannot be used."""

    rows: pa.Array
    """Whether each row has the problem [rows]."""
    what: str
    """What is wrong with them, as the object of "has"."""
    values: pa.Array | None = None
    """The values as they were read [rows]; None if they would not explain anything."""


class Times(NamedTuple):
    """Rows whose times are of one kind."""

    kind: str
    """A key of :data:`UNITS`, :data:`ORDINAL` or :data:`DATED`."""
    values: pa.Array
    """Times as int64 or, if some of them have a fraction, as float64 [rows]."""
    rows: pa.Array | None
    """Whether each row is of this kind [rows]; None for all."""


def read_times(column: pa.Array, named: str) -> tuple[list[Times], list[Problem]]:
    """Return the times of a column by kind, and the rows without a usable time; together these are all rows.

    Args:
        column: times of any type.
        named: name of the file and the column, for error messages.

    Raises:
        InputError: the type of the column is not one of times.
    """
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    problems = []
    if column.null_count:
        problems.append(Problem(column.is_null(), "no timestamp"))
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        dated, wrong = _from_dates(column)
        return dated, problems + wrong
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_decimal(column.type):
        parts, wrong = _from_numbers(_numbers(column), column)
    elif is_text(column.type):
        parts, wrong = _from_text(column)
    else:
        raise InputError(
            f"{named} has the type {column.type}; timestamps must be times, dates, numbers or ISO 8601 text"
        )
    return parts, problems + wrong


def is_text(kind: pa.DataType) -> bool:
    """Return whether a type holds text or nothing but nulls."""
    texts = pa.types.is_string, pa.types.is_large_string, pa.types.is_null
    return is_binary(kind) or any(check(kind) for check in texts)


def is_binary(kind: pa.DataType) -> bool:
    """Return whether a type holds bytes, which may be text."""
    sizes = pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary
    return any(check(kind) for check in sizes)


def _from_dates(column: pa.Array) -> tuple[list[Times], list[Problem]]:
    """Return Arrow's times and dates in nanoseconds; a time without a zone is one of UTC."""
    if pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("s" if pa.types.is_date32(column.type) else "ms"))
    per_second = UNITS[column.type.unit]
    raw = column.cast(pa.int64())
    # Checked in the column's own unit, since nanoseconds end in 2262.
    wrong = _range_problems(raw, column, int((time.time() + DAY) * per_second))
    for problem in wrong:
        raw = pc.if_else(problem.rows, pa.scalar(None, pa.int64()), raw)
    return _parts(DATED, pc.multiply(raw, UNITS["ns"] // per_second)), wrong


def _numbers(column: pa.Array) -> pa.Array:
    """Return numbers of any type as int64 or, if they have fractions or are too large, float64.

    NaN and integers from 2^63 on become null.
    """
    if pa.types.is_uint64(column.type):
        column = pc.if_else(pc.less(column, pa.scalar(2**63, pa.uint64())), column, pa.scalar(None, pa.uint64()))
    if pa.types.is_decimal(column.type) or pa.types.is_float16(column.type):
        column = column.cast(pa.float32() if pa.types.is_float16(column.type) else pa.float64())
    if pa.types.is_floating(column.type):
        column = column.cast(pa.float64())
        column = pc.if_else(pc.is_finite(column), column, pa.scalar(None, pa.float64()))
    try:
        return column.cast(pa.int64())
    except pa.ArrowInvalid:
        return column.cast(pa.float64(), safe=False)


def _from_numbers(numbers: pa.Array, column: pa.Array) -> tuple[list[Times], list[Problem]]:
    """Return numbers by their unit.

    Args:
        numbers: int64 or float64 with null where ``column`` has no number [rows].
        column: the values as they were read [rows].
    """
    wrong = []
    if numbers.null_count > column.null_count:
        wrong.append(Problem(pc.and_(numbers.is_null(), column.is_valid()), NO_TIME, column))
    parts, out_of_range = _by_unit(numbers)
    return parts, wrong + out_of_range


def _by_unit(numbers: pa.Array) -> tuple[list[Times], list[Problem]]:
    limits = pc.min_max(numbers).as_py()
    low, high = limits["min"], limits["max"]
    if low is None:
        return [], []
    now = time.time() + DAY
    for unit, per_second in UNITS.items():
        if FIRST * per_second <= low and high <= now * per_second:
            return _parts(unit, numbers), []
    if low >= 0 and high < FIRST:
        return _parts(ORDINAL, numbers), []
    wrong = _range_problems(numbers, numbers, None)
    ordinal = pc.greater_equal(numbers, 0)
    parts: list[Times] = []
    bound = float if pa.types.is_floating(numbers.type) else int  # Arrow compares no large integer with float64
    for unit, per_second in UNITS.items():
        first, last, end = (bound(limit * per_second) for limit in (FIRST, now, END))
        inside = pc.and_(pc.greater_equal(numbers, first), pc.less(numbers, end))
        past = pc.and_(inside, pc.less_equal(numbers, last))
        ordinal = pc.and_not(ordinal, inside)
        parts += _some(unit, numbers, past)
        wrong += _problem(pc.and_not(inside, past), IN_THE_FUTURE, numbers)
    return parts + _some(ORDINAL, numbers, ordinal), wrong


def _range_problems(numbers: pa.Array, shown: pa.Array, last: int | None) -> list[Problem]:
    """Return the rows before 1970 and, if there is a last permissible number, those after it."""
    found = _problem(pc.less(numbers, 0), BEFORE_1970, shown)
    return found + _problem(pc.greater(numbers, last), IN_THE_FUTURE, shown) if last is not None else found


def _problem(rows: pa.Array, what: str, values: pa.Array) -> list[Problem]:
    rows = rows.fill_null(False)
    return [Problem(rows, what, values)] if pc.any(rows).as_py() else []


def _parts(kind: str, values: pa.Array) -> list[Times]:
    """Return the rows that have a value."""
    if not values.null_count:
        return [Times(kind, values, None)] if len(values) else []
    return _some(kind, values, values.is_valid())


def _some(kind: str, values: pa.Array, rows: pa.Array) -> list[Times]:
    rows = rows.fill_null(False)
    return [Times(kind, values, rows)] if pc.any(rows).as_py() else []


def _from_text(column: pa.Array) -> tuple[list[Times], list[Problem]]:
    """Return the numbers and the ISO 8601 times of a column of text."""
    # The usual columns at Arrow's speed. Not in nanoseconds, in which Arrow lets years from 2262 on overflow.
    for kind in (pa.int64(), pa.timestamp("us"), pa.timestamp("us", "UTC")):
        try:
            read = column.cast(kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            continue
        return _from_numbers(read, column) if kind == pa.int64() else _from_dates(read)
    text = pc.utf8_trim_whitespace(_utf8(column))
    numbers = _numbers_in(text)
    number = numbers.is_valid()
    parts, wrong = _by_unit(numbers)
    seconds, nanoseconds = _iso(pc.if_else(number, pa.scalar(None, pa.string()), text))
    wrong += _range_problems(seconds, text, int(time.time() + DAY))
    for problem in wrong:
        nanoseconds = pc.if_else(problem.rows, pa.scalar(None, pa.int64()), nanoseconds)
    unread = pc.and_not(pc.and_not(column.is_valid(), number), seconds.is_valid())
    wrong = [Problem(problem.rows, problem.what, text) for problem in wrong]
    return parts + _parts(DATED, nanoseconds), wrong + _problem(unread, NO_TIME, text)


def _utf8(column: pa.Array) -> pa.Array:
    """Return text of any type as ``string``; bytes that are not UTF-8 are escaped, which no time contains."""
    try:
        return column.cast(pa.binary()).cast(pa.string())
    except pa.ArrowInvalid:
        values = column.cast(pa.binary()).to_pylist()
        return pa.array([None if raw is None else raw.decode("utf-8", "backslashreplace") for raw in values])


def _numbers_in(text: pa.Array) -> pa.Array:
    """Return the numbers in a text as int64 or, if some have a fraction, float64; null where there is none."""
    none = pa.scalar(None, pa.string())
    text = pc.utf8_ltrim(text, "+")
    decimal = pc.if_else(pc.match_substring_regex(text, _NUMBER), text, none)
    numbers = _numbers(decimal.cast(pa.float64()))
    if pa.types.is_floating(numbers.type):
        return numbers
    whole = pc.if_else(pc.match_substring_regex(text, _INTEGER), text, none)
    return pc.coalesce(whole.cast(pa.int64()), numbers)  # float64 would have rounded nanoseconds


def _iso(text: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Return ISO 8601 times in whole seconds and in nanoseconds since 1970, as UTC; null where there is none.

    Nanoseconds overflow for years from 2262 on, which the seconds tell.
    """
    found = pc.extract_regex(text, _ISO)
    field = {name: pc.struct_field(found, name) for name in _FIELDS}
    given = {name: pc.if_else(pc.equal(values, ""), "0", values) for name, values in field.items()}
    date = pc.binary_join_element_wise(field["year"], field["month"], field["day"], "-")
    days = pc.strptime(date, format="%Y-%m-%d", unit="s", error_is_null=True)
    real = pc.equal(pc.day(days), given["day"].cast(pa.int64()))  # strptime takes February 30 for March 1
    days = pc.if_else(real.fill_null(False), days.cast(pa.int64()), pa.scalar(None, pa.int64()))

    def seconds(hours: str, minutes: str) -> pa.Array:
        return pc.add(
            pc.multiply(given[hours].cast(pa.int64()), 3600), pc.multiply(given[minutes].cast(pa.int64()), 60)
        )

    east = pc.if_else(pc.equal(field["sign"], "-"), -1, 1)
    clock = pc.add(seconds("hour", "minute"), given["second"].cast(pa.int64()))
    whole = pc.subtract(pc.add(days, clock), pc.multiply(east, seconds("zone_hour", "zone_minute")))
    fraction = pc.utf8_rpad(given["fraction"], 9, "0").cast(pa.int64())
    return whole, pc.add(pc.multiply(whole, UNITS["ns"]), fraction)


class Example(NamedTuple):
    """A value and where it was read, for error messages."""

    path: str
    place: str
    value: Any


class TimeUnit:
    """The unit of all times of a data set, and what contradicts it.

    Args:
        skip: whether numbers in no unit may be left out where others have a unit.
    """

    def __init__(self, skip: bool) -> None:
        self._skip = skip
        self._earlier: str | None = None
        self.examples: dict[str, Example] = {}
        """First value of each kind."""
        self.ordinals: Counter[Path] = Counter()
        """Number of ordinals in each file."""
        self.dated_rows = 0
        """Number of rows whose times have a unit."""

    @property
    def number_unit(self) -> str | None:
        """Unit of the numbers; None if there are none, or only ordinals."""
        return next((kind for kind in self.examples if kind in UNITS), None)

    @property
    def kind(self) -> str:
        """Kind of the times that are kept: that of the numbers, or DATED if any time is dated."""
        return DATED if DATED in self.examples else self.number_unit or ORDINAL

    def add(self, kind: str, count: int, path: Path) -> None:
        """Count rows of a kind, of which :attr:`examples` has one.

        Raises:
            InputError: their unit is not that of earlier rows.
        """
        if kind == ORDINAL:
            self.ordinals[path] += count
        else:
            self.dated_rows += count
        numbers = [unit for unit in self.examples if unit in UNITS]
        if len(numbers) > 1:
            told = [f"{_told(self.examples[unit])}, a time in {NAMES[unit]}" for unit in numbers]
            first, second = numbers[:2]
            raise InputError(
                f"{', and '.join(told)}: all numbers must have one unit, so convert {self.examples[second].path} to"
                f" {NAMES[first]}"
            )
        if ORDINAL in self.examples and self.kind != ORDINAL:
            if self._earlier == ORDINAL:
                self._refuse("new times must be numbers of the same kind as the earlier ones")
            if not self._skip:
                self._refuse("correct it or use --skip-bad-lines")

    def settle(self, facts: Mapping[str, Any] | None) -> None:
        """Take what has been added as the times of an earlier data set, which later rows must fit.

        Args:
            facts: what :meth:`facts` returned for the earlier data set; None if that was not recorded.
        """
        self._earlier = self.kind
        if facts and facts["number_unit"]:  # numbers next to dates were stored as dates
            self.examples.setdefault(facts["number_unit"], Example(*facts["example"]))

    def facts(self) -> dict[str, Any]:
        """Return how the times were read and are stored, as JSON can hold it."""
        unit = self.number_unit
        if self.kind == ORDINAL:
            read_as = "numbers outside 1980 to 2100 in every unit, used as an order only"
        else:
            numbers = f"numbers in {NAMES[unit]}" if unit else ""
            read_as = " and ".join(filter(None, ["dates" if self.kind == DATED else "", numbers]))
        return {
            "kind": self.kind,
            "number_unit": unit,
            "example": list(self.examples[unit]) if unit else None,
            "read_as": read_as,
        }

    def check_ordinals(self) -> bool:
        """Return whether ordinals are to be left out, after all rows were read.

        Raises:
            InputError: there are more ordinals than other times, so that it is not clear which are wrong.
        """
        if ORDINAL not in self.examples or self.kind == ORDINAL:
            return False
        if self.ordinals.total() > self.dated_rows:
            self._refuse(
                f"{self.ordinals.total():,} of {self.ordinals.total() + self.dated_rows:,} rows are so: give all times"
                " in one unit"
            )
        return True

    def _refuse(self, remedy: str) -> None:
        other = self.examples[self.kind]
        told = "a date" if self.kind == DATED else f"a time in {NAMES[self.kind]}"
        raise InputError(
            f"{_told(self.examples[ORDINAL])}, which is outside 1980 to 2100 in every unit, and {_told(other)}, {told}:"
            f" {remedy}"
        )


def _told(example: Example) -> str:
    return f"{example.path}: {example.place} has the timestamp {shortened(example.value)}"


def to_nanoseconds(values: pa.Array, unit: str) -> pa.Array:
    """Return times in a unit as nanoseconds, as int64."""
    factor = UNITS["ns"] // UNITS[unit]
    if pa.types.is_integer(values.type):
        return pc.multiply(values, factor)
    whole = pc.floor(values)  # apart from the fraction, since float64 cannot hold the product exactly
    rest = pc.round(pc.multiply(pc.subtract(values, whole), float(factor)))
    return pc.add(pc.multiply(whole.cast(pa.int64()), factor), rest.cast(pa.int64()))


def shown_time(value: float, kind: str) -> str:
    """Return a time for a report: in ISO 8601 if it has a unit."""
    if kind == ORDINAL:
        return f"{value:,}"
    seconds = value / UNITS["ns" if kind == DATED else kind]
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
