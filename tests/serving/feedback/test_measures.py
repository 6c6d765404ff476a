"""The comparison of releases, on users whose preference is known, and by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.feedback.joining import Joined
from serving.feedback.measures import differences, release_measures, weighted_difference

PLACES = {"r1": (5, 10), "r2": (1, 2)}
"""Places at which the simulated releases show the item that a user prefers, equally often."""
KNOWN = {"r1": 0.5, "r2": 0.7}
"""Shares of the answers in which it is shown at all."""
TAKES = 0.8
"""Probability that a user takes the preferred item when it is shown."""
TRUE = {
    "hit_rate": TAKES * (0.7 - 0.5),
    "mrr": TAKES * (0.7 * (1 + 1 / 2) / 2 - 0.5 * (1 / 5 + 1 / 10) / 2),
    # One item is taken, so that the ideal gain is 1.
    "ndcg": TAKES * (0.7 * (1 + 1 / math.log2(3)) / 2 - 0.5 * (1 / math.log2(6) + 1 / math.log2(11)) / 2),
}
"""True differences of r2 to r1, by hand."""


def made(user, group, place, taken=None, day=None, rank=None) -> Joined:
    """Answers of which some had one item taken; ``place`` is 0 where none was."""
    user, group, place = (np.asarray(values, dtype=np.int64) for values in (user, group, place))
    hit = place > 0
    inverse = np.divide(1, place, out=np.zeros(len(place)), where=hit)
    gain = np.where(hit, 1 / np.log2(np.maximum(place, 1) + 1), 0)
    nothing = np.zeros(len(user), dtype=np.int64)
    return Joined(
        user=user,
        group=group,
        groups=["r1", "r2"][: group.max() + 1],
        day=nothing if day is None else np.asarray(day),
        ranked=~nothing.astype(bool),
        fallback=nothing.astype(bool),
        events=hit.astype(np.int64),
        values=np.stack([hit, inverse, gain], axis=1).astype(float),
        taken=np.flatnonzero(hit),
        place=place[hit],
        retriever_rank=(nothing if rank is None else np.asarray(rank))[hit],
    )


def simulated(seed: int, users: int = 2000, answers: int = 3) -> Joined:
    """Each user keeps to one release, as with a canary, and sees some answers of it."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(users), answers)
    group = np.repeat(rng.integers(0, 2, users), answers)
    share = np.where(group == 1, KNOWN["r2"], KNOWN["r1"])
    place = np.array([PLACES["r1"], PLACES["r2"]])[group, rng.integers(0, 2, len(user))]
    return made(user, group, np.where((rng.random(len(user)) < share) & (rng.random(len(user)) < TAKES), place, 0))


def test_the_better_release_is_found_with_its_true_difference():
    """The intervals of all three measures contain the true differences, and none contains 0."""
    joined = simulated(seed=1)
    rows = release_measures(joined)
    (row,) = differences(joined, rows)
    sign = 1 if row["release"] == "r2" else -1
    for name, true in TRUE.items():
        low, high = sorted((sign * row[name]["low"], sign * row[name]["high"]))
        assert 0 < low < true < high
    for found in rows:
        assert found["hit_rate"]["low"] < TAKES * KNOWN[found["release"]] < found["hit_rate"]["high"]


def test_intervals_contain_the_truth_as_often_as_they_say():
    """40 small experiments: 95 % of the intervals should contain it; fewer than 34 have a probability below 0.5 %."""
    inside = 0
    for seed in range(40):
        joined = simulated(seed, users=150)
        (row,) = differences(joined, release_measures(joined))
        sign = 1 if row["release"] == "r2" else -1
        low, high = sorted((sign * row["hit_rate"]["low"], sign * row["hit_rate"]["high"]))
        inside += low < TRUE["hit_rate"] < high
    assert inside >= 34


def test_answers_to_one_user_count_as_one_draw():
    """20 users who take all or nothing, 50 answers each: the interval is that of 20 users, 0.5 +- 1.96 * 0.5 / 20**0.5.
    Answers drawn one by one would make it seven times too narrow.
    """
    user = np.repeat(np.arange(20), 50)
    (row,) = release_measures(made(user, np.zeros(1000), user % 2))
    assert row["hit_rate"]["value"] == 0.5
    half = (row["hit_rate"]["high"] - row["hit_rate"]["low"]) / 2
    assert half == pytest.approx(1.96 * 0.5 / math.sqrt(20), rel=0.15)


def test_measures_of_four_answers_by_hand():
    """Places 1, 2, none and none: hits 2/4, MRR (1 + 1/2) / 4, NDCG (1 + 1/log2(3)) / 4."""
    (row,) = release_measures(made([0, 0, 1, 2], [0, 0, 0, 0], [1, 2, 0, 0]))
    assert (row["answers"], row["users"], row["hits"], row["taken"], row["fallbacks"]) == (4, 3, 2, 2, 0)
    assert row["hit_rate"]["value"] == pytest.approx(2 / 4)
    assert row["mrr"]["value"] == pytest.approx(1.5 / 4)
    assert row["ndcg"]["value"] == pytest.approx((1 + 1 / math.log2(3)) / 4)


def test_movement_by_hand():
    """Taken at places 1, 3 and 2, which the retriever had at 5, 2 and 2: one up by 4, one down by 1, one kept; an item
    that the retriever does not know has not moved. On average (4 - 1 + 0) / 3.
    """
    (row,) = release_measures(made([0, 1, 2, 3], [0, 0, 0, 0], [1, 3, 2, 1], rank=[5, 2, 2, 0]))
    moved = row["moved"]
    assert moved["items"] == 3
    assert [moved[name]["value"] for name in ("up", "down", "places")] == pytest.approx([1 / 3, 1 / 3, 1])


def test_nothing_moved_without_a_ranker():
    (row,) = release_measures(made([0, 1], [0, 0], [1, 0]))
    assert row["moved"] is None


# --- weighted by day


def test_weights_by_hand():
    """Day 0: r1 has 3 answers with 1 hit, r2 one with a hit. Day 1: one each, no hit. Day 2 has only r1, and no part.

    The shares of day 0 are 3/4 and 1/4, those of day 1 a half each. So r1 is (4/3) / (3 * 4/3 + 2) = 2/9, and r2 is
    4 / (4 + 2) = 2/3. By Kish, r2 has (4 + 2)^2 / (4^2 + 2^2) = 1.8 answers, and r1 6^2 / (3 * 16/9 + 4) = 3.86.
    """
    day = np.array([0, 0, 0, 0, 1, 1, 2])
    other = np.array([0, 0, 0, 1, 0, 1, 0])
    hit = np.array([1.0, 0, 0, 1, 0, 0, 1])
    found = weighted_difference(day, np.arange(7), other, np.stack([hit, hit, hit], axis=1))
    assert found["hit_rate"]["value"] == pytest.approx(2 / 3 - 2 / 9)
    assert found["days"] == 2
    assert found["effective_answers"] == [2, 4]


def test_weights_undo_a_share_that_grew_with_the_days():
    """Both releases are equally good: users take something from 10 % of the answers of a quiet day, when a canary has
    5 %, and from 40 % on a busy one, when it has half. The plain means find a difference that is none; the weighted
    ones do not.
    """
    rng = np.random.default_rng(3)
    day = np.repeat([0, 1], 10_000)
    other = (rng.random(20_000) < np.where(day == 0, 0.05, 0.5)).astype(int)
    place = (rng.random(20_000) < np.where(day == 0, 0.1, 0.4)).astype(int)
    joined = made(np.arange(20_000), other, place, day=day)
    (row,) = differences(joined, release_measures(joined))
    assert row["hit_rate"]["low"] > 0.05
    assert row["weighted"]["hit_rate"]["low"] < 0 < row["weighted"]["hit_rate"]["high"]


def test_releases_that_were_never_shown_on_one_day_have_no_weights():
    joined = made(np.arange(40), np.arange(40) // 20, np.ones(40), day=np.arange(40) // 20)
    (row,) = differences(joined, release_measures(joined))
    assert row["weighted"] is None


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=30), st.integers(0, 3))
def test_one_day_needs_no_weights(answers, day):
    """With the same share for every answer of a release, the weighted mean is the plain one."""
    other, hit = np.array(answers).T
    values = np.stack([hit, hit, hit], axis=1).astype(float)
    found = weighted_difference(np.full(len(hit), day), np.arange(len(hit)), other, values)
    if 0 < other.sum() < len(other):
        assert found["hit_rate"]["value"] == pytest.approx(hit[other == 1].mean() - hit[other == 0].mean())
    else:
        assert found is None


# --- how many are needed


def test_a_release_with_few_hits_is_not_compared():
    """Nine hits of the release, 100 of the baseline: an interval of so few is not worth its name."""
    group = np.concatenate([np.zeros(200), np.ones(100)])
    place = np.concatenate([np.arange(200) % 2, np.arange(100) < 9])
    joined = made(np.arange(300), group, place)
    assert differences(joined, release_measures(joined)) == []
    place[209] = 1
    joined = made(np.arange(300), group, place)
    assert len(differences(joined, release_measures(joined))) == 1


def test_the_number_of_answers_that_a_difference_needs():
    """The textbook's for shares of 0.2 and 0.25: (1.96 + 0.84)^2 (p(1-p) + q(1-q)) / (p - q)^2 of each release."""
    group, place = np.arange(2000) % 2, np.zeros(2000, dtype=int)
    place[np.flatnonzero(group == 0)[:200]] = 1
    place[np.flatnonzero(group == 1)[:250]] = 1
    joined = made(np.arange(2000), group, place)
    (row,) = differences(joined, release_measures(joined))
    textbook = 2 * 2.8**2 * (0.2 * 0.8 + 0.25 * 0.75) / 0.05**2
    assert row["answers_needed"] == pytest.approx(textbook, rel=0.1)
