"""The policy of a request: groups of items that an answer may hold, boosts, and repeats."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from numbers import Real
from reprlib import repr as short
from typing import Any

from llamarec_client.checks import is_unicode, whole_number
from llamarec_client.contract import MAX_POLICY_BYTES, MAX_POLICY_NUMBER, POLICY, REPEATS
from llamarec_client.errors import InvalidRequest


class Unset(Enum):
    """The value of a field that a request does not set."""

    UNSET = "what the server's release says"


UNSET = Unset.UNSET


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What may be recommended to one user.

    A field that is not set keeps what the server's release says; None sets it to nothing. The fields about groups and
    ``repeats`` are for requests without ``candidates``.
    """

    max_per_group: int | Unset | None = UNSET
    """Maximum number of items of one group among the candidates; items without a group are not limited."""
    only_groups: Sequence[str] | Unset | None = UNSET
    """Groups of which all recommended items are; not empty."""
    never_groups: Sequence[str] | Unset | None = UNSET
    """Groups of which no recommended item is."""
    boosts: Mapping[str, float] | Unset | None = UNSET
    """For raw item ids the factor by which the odds of the item are multiplied, above 0."""
    repeats: int | str | Unset | None = UNSET
    """Which items of the history may be recommended: ``"none"``, ``"all"``, or with a number N those that are not among
    its last N items."""

    def text(self) -> str:
        """Return the policy as the JSON of its tensor.

        Raises:
            InvalidRequest: a value is not what it has to be; the message names the field.
        """
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        given = {name: self._checked(name, value) for name, value in values.items() if value is not UNSET}
        text = json.dumps(given, ensure_ascii=False)
        if len(text.encode()) > MAX_POLICY_BYTES:
            raise InvalidRequest(f"{POLICY.name} has {len(text.encode()):,} bytes: give at most {MAX_POLICY_BYTES:,}")
        return text

    @staticmethod
    def _checked(field: str, value: Any) -> Any:
        """Return a field's value as JSON has it."""
        name = f"{POLICY.name}: {field}"
        if value is None:
            return None
        if field == "boosts":
            return _factors(name, value)
        if field in ("only_groups", "never_groups"):
            return _names(name, value)
        if field == "repeats" and isinstance(value, str):
            if value in REPEATS:
                return value
            raise InvalidRequest(f'{name} is {short(value)}: give "none", "all" or a number of items')
        return whole_number(name, value, MAX_POLICY_NUMBER)


def _names(name: str, value: Any) -> list[str]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise InvalidRequest(f"{name} is {short(value)}: give a list of names of groups")
    for group in value:
        if not isinstance(group, str) or not is_unicode(group):
            raise InvalidRequest(f"{name} holds {short(group)}: names of groups are strings of valid Unicode")
    return list(value)


def _factors(name: str, value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{name} is {short(value)}: give a dict with a factor for each item id")
    found = {}
    for item, factor in value.items():
        if not isinstance(item, str) or not is_unicode(item):
            raise InvalidRequest(f"{name} holds {short(item)}: item ids are strings of valid Unicode")
        if not isinstance(factor, Real) or isinstance(factor, bool) or not 0 < float(factor) < math.inf:
            raise InvalidRequest(f"{name}[{short(item)}] is {short(factor)}: give a factor above 0")
        found[item] = float(factor)
    return found
