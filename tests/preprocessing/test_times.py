"""Times of every type, by kind; the expected values are from Python's datetime or worked out by hand."""

from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocessing.errors import InputError
from preprocessing.times import (
    BEFORE_1970,
    DATED,
    IN_THE_FUTURE,
    NO_TIME,
    ORDINAL,
    UNITS,
    Example,
    TimeUnit,
    read_times,
    to_nanoseconds,
)

AT = 1_600_000_000
"""2020-09-13T12:26:40Z."""


def read(column):
    """Return for each row its kind and value, or what is wrong with it; each row must be told once."""
    times, problems = read_times(column, "log: column t")
    found = [[] for _ in range(len(column))]
    for kind, values, rows in times:
        for row, value in enumerate(values.to_pylist()):
            if rows is None or rows[row].as_py():
                found[row].append((kind, value))
    for problem in problems:
        for row, has in enumerate(problem.rows.to_pylist()):
            if has:
                found[row].append(problem.what)
    assert [len(row) for row in found] == [1] * len(column)
    return [row[0] for row in found]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([AT, AT + 1]), [("s", AT), ("s", AT + 1)]),
        (pa.array([AT, 0, -4, 4_000_000_000]), [("s", AT), (ORDINAL, 0), BEFORE_1970, IN_THE_FUTURE]),
        (pa.array([AT * 10**9 + 1, 2**63 + 5], pa.uint64()), [("ns", AT * 10**9 + 1), NO_TIME]),
        (pa.array([1.5, float("nan"), float("inf"), 2.0]), [(ORDINAL, 1.5), NO_TIME, NO_TIME, (ORDINAL, 2.0)]),
        (pa.array([Decimal("1600000000"), None]), [("s", AT), "no timestamp"]),
        (pa.array([AT * 1000], pa.int64()).dictionary_encode(), [("ms", AT * 1000)]),
        (pa.array([99_999_999_999, 100]), [(ORDINAL, 99_999_999_999), (ORDINAL, 100)]),
        (pa.array([date(2020, 9, 13), date(9999, 12, 31)]), [(DATED, (AT - 44_800) * 10**9), IN_THE_FUTURE]),
        (pa.array([datetime(1, 1, 1)], pa.timestamp("us", "Europe/Berlin")), [BEFORE_1970]),
        (pa.nulls(1), ["no timestamp"]),
        (pa.array([], pa.string()), []),
    ],
)
def test_columns_of_any_type(column, expected):
    """The unit of a number is that in which it lies between 1980 and 2100; typed times become nanoseconds."""
    assert read(column) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1600000000", ("s", AT)),
        (" +1600000000 ", ("s", AT)),
        ("1600000000.0", ("s", AT)),
        ("1.6e9", ("s", AT)),
        ("1600000000000000001", ("ns", AT * 10**9 + 1)),
        ("1_600_000_000", NO_TIME),
        ("yesterday", NO_TIME),
        ("", NO_TIME),
        ("nan", NO_TIME),
        ("2020-09-13", (DATED, (AT - 44_800) * 10**9)),
        ("2020-09-13T12:26:40Z", (DATED, AT * 10**9)),
        ("2020-09-13 12:26:40", (DATED, AT * 10**9)),
        ("2020-09-13 12:26:40 UTC", (DATED, AT * 10**9)),
        ("2020-09-13T14:26:40.123456789+02:00", (DATED, AT * 10**9 + 123_456_789)),
        ("2020-09-13T09:56:40,5-0230", (DATED, AT * 10**9 + 500_000_000)),
        ("20200913T122640Z", (DATED, AT * 10**9)),
        ("2020-09-13T12", (DATED, (AT - 1600) * 10**9)),
        ("2020-02-30", NO_TIME),
        ("2020-13-01", NO_TIME),
        ("13/09/2020", NO_TIME),
        ("1969-12-31T23:59:59Z", BEFORE_1970),
        ("9999-12-31", IN_THE_FUTURE),
        ("2604-07-21T23:34:33Z", IN_THE_FUTURE),  # 2^64 nanoseconds after 2020
    ],
)
def test_text(text, expected):
    """A text is read alone, and in a column with numbers, times and words, in which Arrow's own parser fails."""
    assert read(pa.array([text])) == [expected]
    assert read(pa.array([text, "x", "2020-09-13T12:26:40+00:00", "5.5", None]))[0] == pytest.approx(expected)


@settings(max_examples=25)
@given(
    st.datetimes(datetime(1970, 1, 2), datetime(2026, 1, 1)),
    st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes))),
    st.sampled_from(["T", " "]),
)
def test_iso_8601_as_python_writes_it(moment, zone, separator):
    """Times with any zone, and without one as UTC, are those of datetime."""
    since = (moment - datetime(1970, 1, 1)) // timedelta(microseconds=1) * 1000
    there = moment.replace(tzinfo=timezone.utc).astimezone(zone)
    for text in (moment.isoformat(separator), there.isoformat(separator), f"{there:%Y%m%dT%H%M%S,%f%z}"):
        for column in ([text], [text, "9"]):
            assert read(pa.array(column))[0] == (DATED, since)


@settings(max_examples=50)
@given(st.integers(10**9, 1_700_000_000), st.sampled_from(sorted(UNITS)))
def test_the_unit_of_a_number(seconds, unit):
    """Every time of this century has one unit, as a number, as text and as a float."""
    value = seconds * UNITS[unit]
    for column in ([value], [str(value)], [float(value)]):
        assert read(pa.array(column)) == [(unit, value)]
    assert to_nanoseconds(pa.array([value]), unit).to_pylist() == [seconds * 10**9]


def test_fractions_of_seconds_in_nanoseconds():
    """A fraction that float64 holds exactly is kept."""
    assert to_nanoseconds(pa.array([AT + 0.25]), "s").to_pylist() == [AT * 10**9 + 250_000_000]


def test_a_type_that_is_no_time():
    for column in (pa.array([True]), pa.array([[1]]), pa.array([1], pa.duration("s"))):
        with pytest.raises(InputError, match=r"log: column t has the type .*; timestamps must be"):
            read_times(column, "log: column t")


def test_an_earlier_data_set_decides():
    """Ordinals that were there first are not given up for dates, even if bad lines are skipped."""
    units = TimeUnit(skip=True)
    units.examples = {ORDINAL: Example("old", "row 1", 7)}
    units.add(ORDINAL, 5, Path("old"))
    units.settle(None)
    units.examples["s"] = Example("new", "row 1", AT)
    with pytest.raises(InputError, match="new times must be numbers of the same kind as the earlier ones"):
        units.add("s", 100, Path("new"))
