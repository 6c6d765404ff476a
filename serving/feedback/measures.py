"""Compares releases by what was taken from their answers."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.intervals import resampled_ratios
from serving.feedback.joining import Joined

MEASURES = ("hit_rate", "mrr", "ndcg")
ENOUGH_HITS = 10
"""Number of answers with a hit from which an interval is worth its name: the rule of thumb for the normal
approximation of a share, which a bootstrap over fewer hits does not beat."""
POWER = 2.8
"""Standard errors that a difference has to have to be found in four of five experiments: 1.96 for an interval of 95 %,
and 0.84 for the 80 %."""


Estimate = dict[str, float]
"""A figure's ``value``, and ``low`` and ``high`` of its 95 % interval over users."""


def release_measures(joined: Joined) -> list[dict[str, Any]]:
    """Return for each release the means over its answers, and how its ranker moved what was taken.

    Every answer counts, also those after which nothing happened: a release that makes users do more must not lose by
    it. ``moved`` is None for a release without taken items that both the retriever and the ranker ordered.
    """
    found = []
    values, draws = _means(joined.user, joined.group, joined.values, np.ones(len(joined.user)), len(joined.groups))
    for number, name in enumerate(joined.groups):
        own = joined.group == number
        found.append(
            {
                "release": name,
                "answers": int(own.sum()),
                "users": len(np.unique(joined.user[own])),
                "fallbacks": int(joined.fallback[own].sum()),
                "hits": int(joined.values[own, 0].sum()),
                "taken": int(own[joined.taken].sum()),
                **{
                    name: _estimate(values[number, place], draws[:, number, place])
                    for place, name in enumerate(MEASURES)
                },
                "moved": _movement(joined, number),
            }
        )
    return found


def differences(joined: Joined, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each other release what it is better by than the one with the most answers, which is the baseline.

    A release with fewer than :data:`ENOUGH_HITS` hits is not compared, and neither is any if the baseline has fewer.

    Args:
        joined: answers with what was taken.
        rows: what :func:`release_measures` returned.
    """
    base = max(range(len(rows)), key=lambda number: rows[number]["answers"])
    enough = [row["hits"] >= ENOUGH_HITS for row in rows]
    return [
        _difference(joined, rows, base, other)
        for other in range(len(rows))
        if other != base and enough[other] and enough[base]
    ]


def _difference(joined: Joined, rows: Sequence[dict[str, Any]], base: int, other: int) -> dict[str, Any]:
    own = np.isin(joined.group, (base, other))
    is_other = (joined.group[own] == other).astype(np.int64)
    user, values = joined.user[own], joined.values[own]
    means, draws = _means(user, is_other, values, np.ones(len(user)), 2)
    change, changes = means[1] - means[0], draws[:, 1] - draws[:, 0]  # [measures], [draws, measures]
    return {
        "release": rows[other]["release"],
        "baseline": rows[base]["release"],
        **{name: _estimate(change[place], changes[:, place]) for place, name in enumerate(MEASURES)},
        "answers_needed": _needed(len(user), change[0], changes[:, 0]),
        "weighted": weighted_difference(joined.day[own], user, is_other, values),
    }


def weighted_difference(
    day: NDArray[np.int64], user: NDArray[np.int64], is_other: NDArray[np.int64], values: NDArray[np.float64]
) -> dict[str, Any] | None:
    """Return the difference between two rankings as if both had been shown with equal shares on each day.

    A canary often starts on a quiet day with 5 % and ends on a busy one with 50 %; then the plain means compare days as
    much as releases. This is the self-normalised estimator of inverse propensities (Swaminathan and Joachims 2015, "The
    Self-Normalized Estimator for Counterfactual Learning"). Each answer i of a release r is weighted by
    w_i = 1 / p(r | d_i), where d_i is its day (UTC) and p(r | d) the share of r among the answers that both releases
    gave on day d. The estimate for r is the sum of w_i y_i divided by the sum of w_i, over the answers of r, with y_i
    the measure of answer i. Days on which only one of them was shown say nothing about the other, and are left out.

    It is right if within a day chance decides who gets which release, as with a canary of a share of the users. The
    interval takes the shares as known.

    Args:
        day: of each answer [answers].
        user: number of its user [answers].
        is_other: 1 for the release, 0 for its baseline [answers].
        values: measures [answers, measures].

    Returns:
        The differences; ``days``, on which both were shown; and ``effective_answers`` of the release and its baseline,
        as many answers of equal weight as tell as much (Kish 1965). None if there was no such day.
    """
    days, at = np.unique(day, return_inverse=True)
    shown = np.bincount(at * 2 + is_other, minlength=2 * len(days)).reshape(-1, 2)  # [days, 2]
    both = (shown > 0).all(axis=1)
    if not both.any():
        return None
    share = shown / shown.sum(axis=1, keepdims=True)  # propensities p(r | d)
    kept = both[at]
    weight = 1 / share[at[kept], is_other[kept]]
    means, draws = _means(user[kept], is_other[kept], values[kept], weight, 2)
    change, changes = means[1] - means[0], draws[:, 1] - draws[:, 0]
    effective = [
        weight[is_other[kept] == one].sum() ** 2 / (weight[is_other[kept] == one] ** 2).sum() for one in (1, 0)
    ]
    return {
        "days": int(both.sum()),
        "effective_answers": [round(float(number)) for number in effective],
        **{name: _estimate(change[place], changes[:, place]) for place, name in enumerate(MEASURES)},
    }


def _movement(joined: Joined, group: int) -> dict[str, Any] | None:
    """Return the shares of taken items that the ranker moved up and down from the retriever's rank, and by how much.

    Only items that the retriever ranked, in answers of the ranker.
    """
    own = (joined.group[joined.taken] == group) & joined.ranked[joined.taken] & (joined.retriever_rank > 0)
    if not own.any():
        return None
    places = joined.retriever_rank[own] - joined.place[own]
    moves = np.stack([places > 0, places < 0, places], axis=1).astype(np.float64)
    user, one = joined.user[joined.taken[own]], np.ones(len(places))
    means, draws = _means(user, np.zeros(len(places), np.int64), moves, one, 1)
    names = ("up", "down", "places")
    estimates = {name: _estimate(means[0, place], draws[:, 0, place]) for place, name in enumerate(names)}
    return {"items": len(places), **estimates}


def _means(
    user: NDArray[np.int64],
    group: NDArray[np.int64],
    values: NDArray[np.float64],
    weight: NDArray[np.float64],
    groups: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the weighted means of each group, and those of users drawn with replacement.

    Args:
        user: number of each row's user [rows].
        group: number of its group [rows].
        values: [rows, measures].
        weight: [rows].
        groups: number of groups.

    Returns:
        Means [groups, measures], and draws [repeats, groups, measures].
    """
    users, number = np.unique(user, return_inverse=True)
    measures = values.shape[1]
    cell, cells = number * groups + group, len(users) * groups
    summed = [np.bincount(cell, weight * column, cells).reshape(-1, groups) for column in values.T]
    sums = np.stack(summed, axis=2).reshape(len(users), -1)  # [users, groups * measures]
    counts = np.repeat(np.bincount(cell, weight, cells).reshape(-1, groups), measures, axis=1)
    means = sums.sum(axis=0) / counts.sum(axis=0)
    return means.reshape(groups, measures), resampled_ratios(sums, counts).reshape(-1, groups, measures)


def _estimate(value: float, draws: NDArray[np.float64]) -> Estimate:
    known = draws[~np.isnan(draws)]
    low, high = np.percentile(known, [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high)}


def _needed(answers: int, change: float, draws: NDArray[np.float64]) -> int | None:
    """Return about how many answers would tell a difference of this size from none; None if there is no difference.

    The standard error shrinks with the root of the number of answers.
    """
    error = float(np.nanstd(draws))
    return None if not change else math.ceil(answers * (POWER * error / abs(change)) ** 2)
