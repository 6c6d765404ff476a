"""The policy of a request or of a release: which groups of items an answer may hold, boosts, and repeats.

A policy is a JSON object. It is read and checked once, in the features step, which makes :class:`Rules` of it for the
retrieval stage; offline runs do the same.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamarec_client.contract import (
    CANDIDATES,
    MAX_POLICY_BYTES,
    MAX_POLICY_ENTRIES,
    MAX_POLICY_NUMBER,
    POLICY,
    POLICY_FIELDS,
    REPEATS,
)
from models.retriever.candidates import Candidates
from models.retriever.inference.onnx_retriever import OnnxRetriever
from models.retriever.rules import Rules
from preprocessing.catalogue import Catalogue
from preprocessing.errors import InputError
from preprocessing.features import EncodedRequest, FeatureEncoder
from preprocessing.groups import Groups

POLICY_FILE = "policy.json"
"""File with the policy of a release, in the folder of its features step."""
EXAMPLE = '{"max_per_group": 2}'
SHOWN_GROUPS = 10
"""Number of groups that an error names."""
GROUP_FIELDS = ("max_per_group", "only_groups", "never_groups")


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a policy says; None where it says nothing."""

    max_per_group: int | None = None
    """Maximum number of items of one group among the candidates."""
    only_groups: tuple[str, ...] | None = None
    """Groups of which all recommended items are."""
    never_groups: tuple[str, ...] | None = None
    """Groups of which no recommended item is."""
    boosts: Mapping[str, float] | None = None
    """Factor of an item's odds by raw id."""
    repeats: int | str | None = None
    """Which items of the history may be recommended: ``none``, ``all``, or those older than the last N items."""

    def given(self) -> dict[str, Any]:
        """Return the fields that say something, as JSON has them."""
        fields = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def of(cls, fields: Mapping[str, Any], source: str = "the policy") -> "Policy":
        """Return the policy with these fields, as JSON has them; its groups are not checked (:func:`check_groups`).

        Args:
            fields: some of those of this class.
            source: where they come from, for messages.

        Raises:
            InputError: a field is unknown, or a value is not what it has to be.
        """
        return cls(**read_policy(json.dumps(fields).encode(), source))


NO_POLICY = Policy()


def read_policy(raw: bytes, source: str) -> dict[str, Any]:
    """Return the fields of a policy, those that are null included.

    Args:
        raw: the JSON object.
        source: name of the tensor or file, for messages.

    Raises:
        InputError: the policy is too long or not JSON, has an unknown field, or a value is not what it has to be; the
            message names the field.
    """
    if len(raw) > MAX_POLICY_BYTES:
        raise InputError(f"{source} has {len(raw):,} bytes: give at most {MAX_POLICY_BYTES:,}")
    try:
        found = json.loads(raw.decode(), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source} is not JSON ({error}): give one object, such as {EXAMPLE}") from None
    if not isinstance(found, dict):
        raise InputError(f"{source} is {short(found)}: give one JSON object, such as {EXAMPLE}")
    for name, value in found.items():
        if name not in POLICY_FIELDS:
            raise InputError(f"{source} has an unknown field {short(name)}: it takes {', '.join(POLICY_FIELDS)}")
        if value is not None:
            found[name] = CHECKS[name](f"{source}: {name}", value)
    return found


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, in which no name may occur twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{short(twice)} occurs more than once")
    return found


def _number(name: str, value: Any, otherwise: str = "null for no limit") -> int:
    if type(value) is not int or not 1 <= value <= MAX_POLICY_NUMBER:
        raise InputError(
            f"{name} is {short(value)}: give a whole number from 1 to {MAX_POLICY_NUMBER:,}, or {otherwise}"
        )
    return value


def _names(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise InputError(f"{name} is {short(value)}: give a list of names of groups, or null")
    if len(value) > MAX_POLICY_ENTRIES:
        raise InputError(f"{name} holds {len(value):,} groups: give at most {MAX_POLICY_ENTRIES:,}")
    return tuple(value)


def _some_names(name: str, value: Any) -> tuple[str, ...]:
    if value == []:
        raise InputError(f"{name} is empty, so no item could be recommended: name a group, or give null for all items")
    return _names(name, value)


def _boosts(name: str, value: Any) -> dict[str, float]:
    if not isinstance(value, dict):
        raise InputError(f"{name} is {short(value)}: give an object with a factor for each item id, or null")
    if len(value) > MAX_POLICY_ENTRIES:
        raise InputError(f"{name} holds {len(value):,} items: give at most {MAX_POLICY_ENTRIES:,}")
    return {item: _factor(f"{name}[{short(item)}]", factor) for item, factor in value.items()}


def _factor(name: str, value: Any) -> float:
    try:
        factor = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:  # a whole number with hundreds of digits
        factor = math.inf
    if not 0 < factor < math.inf:
        raise InputError(f"{name} is {short(value)}: give a factor above 0, where 1 changes nothing")
    return factor


def _repeats(name: str, value: Any) -> int | str:
    if value in REPEATS and isinstance(value, str):
        return value
    return _number(name, value, '"none" or "all"')


CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    "max_per_group": _number,
    "only_groups": _some_names,
    "never_groups": _names,
    "boosts": _boosts,
    "repeats": _repeats,
}
"""For each of POLICY_FIELDS, what returns its checked value."""


def check_groups(fields: Mapping[str, Any], groups: Groups, source: str) -> None:
    """Check that there are the groups that the fields of a policy need.

    Raises:
        InputError: there are not.
    """
    for field in GROUP_FIELDS:
        wanted = fields.get(field)
        if not wanted:
            continue
        if not groups.names:
            raise InputError(
                f"{source}: {field} needs groups, and the items have none: leave it out, or export what `llamarec"
                " preprocess --group-column` made"
            )
        if field != "max_per_group":
            _check_names(f"{source}: {field}", wanted, groups)


def _check_names(name: str, wanted: Sequence[str], groups: Groups) -> None:
    known = set(groups.names)
    if unknown := next((group for group in wanted if group not in known), None):
        more = ", ..." if len(known) > SHOWN_GROUPS else ""
        shown = ", ".join(map(repr, groups.names[:SHOWN_GROUPS]))
        raise InputError(f"{name} holds {short(unknown)}, which is none of the {len(known):,} groups: {shown}{more}")


def read_policy_file(path: Path) -> Policy:
    """Return the policy in a file; its groups are not checked yet, see :func:`check_groups`.

    Raises:
        InputError: the file cannot be read, or its policy is invalid.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): name a file with a policy") from None
    return Policy(**read_policy(raw, str(path)))


def save_policy(folder: Path, policy: Policy) -> None:
    """Write a policy into an existing folder."""
    (folder / POLICY_FILE).write_text(json.dumps(policy.given(), indent=1) + "\n", encoding="utf-8")


def load_policy(folder: Path) -> Policy:
    """Return the policy that :func:`save_policy` wrote; that of a release without one says nothing."""
    path = folder / POLICY_FILE
    return read_policy_file(path) if path.is_file() else NO_POLICY


def rules_of(
    given: bytes | None,
    default: Policy,
    encoder: FeatureEncoder,
    history: Sequence[bytes],
    request: EncodedRequest,
) -> Rules | None:
    """Return the rules for a request; None if there is no policy.

    Args:
        given: POLICY of the request; None if it has none.
        default: policy of the release, which the fields that are given replace.
        encoder: the encoder of the request.
        history: raw ids of the history, oldest first.
        request: the request, encoded.

    Raises:
        InputError: the policy is invalid, or the rules about groups and repeats are given together with candidates.
    """
    if given is None and default is NO_POLICY:
        return None
    fields = {} if given is None else read_policy(given, POLICY.name)
    check_groups(fields, encoder.catalogue.groups, POLICY.name)
    policy = replace(default, **fields)
    texts = dict(zip(request.given_ids, request.given.tolist(), strict=False))  # none if the caller gave no titles
    boosts = _log_factors(policy.boosts or {}, encoder.catalogue, texts)
    if not request.retrieve:
        _refuse_rules_for_candidates(fields)
        return Rules(boosts=boosts)
    masked = _masked(policy.repeats)
    return _rules(policy, boosts, encoder.count_known(history[-masked:]) if masked else masked)


def rules_for_known(policy: Policy, catalogue: Catalogue) -> Rules | None:
    """Return the rules of a release's policy for histories of which the retriever knows every item."""
    if policy is NO_POLICY:
        return None
    return _rules(policy, _log_factors(policy.boosts or {}, catalogue, {}), _masked(policy.repeats))


def retrieved(
    retriever: OnnxRetriever,
    catalogue: Catalogue,
    rules: Rules | None,
    history: NDArray[np.int32],
    excluded: NDArray[np.int32],
) -> Candidates:
    """Return the retriever's candidates for a history of item numbers, by the rules if there are any."""
    if rules is None:
        return retriever.candidates(history, excluded)
    return retriever.candidates_by(rules, catalogue.groups, history, excluded)


def given_candidates(
    retriever: OnnxRetriever, rules: Rules | None, history: NDArray[np.int32], items: NDArray[np.int32]
) -> Candidates:
    """Return the caller's candidates in the retriever's order, by the rules if there are any."""
    return retriever.given(history, items) if rules is None else retriever.given_by(rules, history, items)


def _rules(policy: Policy, boosts: Mapping[int, float], masked: int | None) -> Rules:
    return Rules(
        max_per_group=policy.max_per_group,
        only_groups=policy.only_groups,
        never_groups=policy.never_groups or (),
        masked=masked,
        boosts=boosts,
    )


def _refuse_rules_for_candidates(fields: Mapping[str, Any]) -> None:
    for field in (*GROUP_FIELDS, "repeats"):
        if fields.get(field) not in (None, (), "none"):
            raise InputError(
                f"{POLICY.name}: {field} does not apply to {CANDIDATES.name}, which the caller chose: leave one of the"
                " two out"
            )


def _masked(repeats: int | str | None) -> int | None:
    """Return how many of the last entries of a history are masked; None for all."""
    if repeats is None or repeats == "none":
        return None
    return 0 if repeats == "all" else int(repeats)


def _log_factors(boosts: Mapping[str, float], catalogue: Catalogue, given: Mapping[bytes, int]) -> dict[int, float]:
    """Return the logarithms of factors by item number; unknown items and factors of 1 are left out.

    Args:
        boosts: factors by raw id.
        catalogue: knows the numbers of its items.
        given: numbers of candidates by the ids in the request; these come first.
    """
    found = {}
    for raw, factor in boosts.items():
        key = raw.encode(errors="surrogatepass")
        item = given.get(key) or catalogue.number(key)
        if item is not None and factor != 1:
            found[item] = math.log(factor)
    return found


def encode_rules(rules: Rules | None) -> list[bytes]:
    """Return the tensor RULES."""
    if rules is None:
        return []
    return [json.dumps({**asdict(rules), "boosts": list(rules.boosts.items())}).encode()]


def decode_rules(tensor: Sequence[bytes] | NDArray[Any]) -> Rules | None:
    """Return what :func:`encode_rules` was given."""
    if not len(tensor):
        return None
    fields = json.loads(tensor[0])
    only = fields.pop("only_groups")
    return Rules(
        only_groups=None if only is None else tuple(only),
        never_groups=tuple(fields.pop("never_groups")),
        boosts=dict(fields.pop("boosts")),
        **fields,
    )
