"""Checks of arguments; each returns the value as the type that gRPC needs, or raises InvalidRequest."""

import operator
from numbers import Real
from reprlib import repr as short

from llamarec_client.errors import InvalidRequest


def whole_number(name: str, value: object, highest: int) -> int:
    """Return ``value``, an integer of Python or NumPy from 1 to ``highest``, as an int.

    Raises:
        InvalidRequest: it is not one.
    """
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]  # hence the except
    except TypeError:
        number = 0
    if not 1 <= number <= highest:
        raise InvalidRequest(f"{name} is {short(value)}: give a whole number from 1 to {highest}")
    return number


def seconds(name: str, value: object, highest: float) -> float:
    """Return ``value``, a number of Python or NumPy above 0 and up to ``highest``, as a float.

    Raises:
        InvalidRequest: it is not one.
    """
    if isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) <= highest:
        return float(value)
    raise InvalidRequest(f"{name} is {short(value)}: give a number of seconds above 0, at most {highest:,.0f}")


def text(name: str, value: object) -> str:
    """Return ``value``, a string that is not empty and can be encoded as UTF-8.

    Raises:
        InvalidRequest: it is not one.
    """
    if isinstance(value, str) and value and is_unicode(value):
        return value
    raise InvalidRequest(f"{name} is {short(value)}: give a string of valid Unicode that is not empty")


def same_length(ids: str, count: int, titles: str, titled: int) -> None:
    """Check that there is one title for each id.

    Args:
        ids: name of the ids' tensor.
        count: number of ids.
        titles: name of the titles' tensor.
        titled: number of titles.

    Raises:
        InvalidRequest: there are more or fewer.
    """
    if count != titled:
        raise InvalidRequest(
            f"{ids} holds {count:,} ids and {titles} {titled:,} titles: give one title for each id, which may be empty,"
            " or no ids"
        )


def is_unicode(value: str) -> bool:
    """Return whether a string can be encoded as UTF-8; one with lone surrogates cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
