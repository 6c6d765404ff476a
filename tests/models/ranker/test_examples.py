"""Training examples: what they may hold, and that they are reproducible."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.ranker.examples import (
    CopiedPools,
    EvidentPools,
    Example,
    Position,
    RandomPools,
    RetrievedPools,
    growing,
    sample_examples,
)
from models.ranker.titles import TitleNearness
from preprocessing.catalogue import Catalogue
from preprocessing.errors import InputError

RANDOM = RandomPools(items=40, candidates=20)


def sequences(*rows: list[int]) -> list[np.ndarray]:
    return [np.array(row, np.int32) for row in rows]


def as_lists(examples: list[Example]) -> list[tuple[list[int], list[int], int]]:
    return [(example.history.tolist(), example.candidates.tolist(), example.truth) for example in examples]


def prefixes(examples: list[Example]) -> list[list[int]]:
    return sorted([*example.history.tolist(), int(example.candidates[example.truth])] for example in examples)


def ten_from(first: int):
    """A retriever that lists the ten items from ``first`` on, whatever came before."""
    return lambda positions: [np.arange(first, first + 10, dtype=np.int32)] * len(positions)


def test_every_prefix_of_two_or_more_is_one_example():
    """Sequences of 3, 1 and 2 items give the prefixes 1-2, 1-2-3 and 5-6, each once (paper, section 4.0.4)."""
    examples = sample_examples(sequences([1, 2, 3], [4], [5, 6]), RANDOM, seed=0)
    assert prefixes(examples) == [[1, 2], [1, 2, 3], [5, 6]]


@settings(deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=30), min_size=1, max_size=5),
    count=st.integers(1, 20),
    seed=st.integers(0, 9),
)
def test_candidates_are_the_truth_and_items_outside_the_prefix(rows: list[list[int]], count: int, seed: int):
    """20 distinct candidates, or as many as the catalogue of 40 leaves; none but the truth is from the prefix."""
    for example in sample_examples(sequences(*rows), RANDOM, count=count, seed=seed):
        target = int(example.candidates[example.truth])
        prefix = {*example.history.tolist(), target}
        candidates = example.candidates.tolist()
        assert len(set(candidates)) == len(candidates) == min(20, 40 - len(prefix) + 1)
        assert prefix & set(candidates) == {target}


@settings(deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=30), min_size=1, max_size=5),
    shown=st.integers(1, 10),
    seed=st.integers(0, 9),
)
def test_what_is_copied_stands_in_the_history_that_is_shown(rows: list[list[int]], shown: int, seed: int):
    """The target is among the latest items; the other candidates, distinct, are nowhere in the history."""
    for example in sample_examples(sequences(*rows), CopiedPools(40, 20, shown), seed=seed):
        target, history = int(example.candidates[example.truth]), example.history.tolist()
        candidates = example.candidates.tolist()
        assert target in history[-shown:]
        assert len(set(candidates)) == len(candidates)
        assert set(history) & set(candidates) == {target}


def test_pools_that_copy_share_a_history_and_differ_in_the_rest():
    """Three examples of each of two positions: one history, targets and candidates drawn anew."""
    examples = sample_examples(sequences(list(range(1, 12)), [1]), CopiedPools(40, 20, 10, pools=3), count=6, seed=0)
    assert len(examples) == 6
    for pools in (examples[:3], examples[3:]):
        assert len({tuple(example.history.tolist()) for example in pools}) == 1
        assert len({tuple(example.candidates.tolist()) for example in pools}) == 3


def test_sampling_repeats_with_its_seed_and_only_then():
    """The same seed gives the same examples in the same order; another one does not."""
    training = sequences(list(range(1, 20)), list(range(20, 40)))
    first, again, other = (as_lists(sample_examples(training, RANDOM, count=8, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_truths_are_spread_over_the_letters():
    """Shuffled candidates: over 400 examples each of 20 places holds the truth 20 times on average, never below 5."""
    training = sequences(*([list(range(1, 6))] * 100))
    places = [example.truth for example in sample_examples(training, RANDOM, seed=0)]
    assert np.bincount(places, minlength=20).min() >= 5


def test_a_users_later_items_are_negatives_like_any():
    """Left out, they would be given away: behind item 3 alone 19 of 38 others are drawn, 5 half the time."""
    lists = [
        example.candidates
        for seed in range(60)
        for example in sample_examples(sequences([3, 4, 5]), RANDOM, seed=seed)
        if len(example.history) == 1
    ]
    assert len(lists) == 60
    assert 15 < sum(5 in candidates for candidates in lists) < 45


def test_retrieved_lists_are_used_as_they_are_where_they_hold_the_target():
    """Targets 2 and 3 are not among 5..14, targets 5 and 14 are, at the places 0 and 9 of the list: nothing moved."""
    pools = RetrievedPools(ten_from(5), "retriever")
    examples = sample_examples(sequences([1, 2, 3], [1, 5], [1, 14]), pools, seed=0)
    assert sorted(as_lists(examples)) == [([1], list(range(5, 15)), 0), ([1], list(range(5, 15)), 9)]


def test_shuffled_lists_hold_the_same_items_in_other_orders():
    """Three pools of one position: one history, the same ten candidates, the truth wherever it fell."""
    pools = RetrievedPools(ten_from(5), "shuffled", pools=3)
    examples = sample_examples(sequences([1, 8]), pools, seed=0)
    assert len(examples) == 3
    assert prefixes(examples) == [[1, 8]] * 3
    assert all(sorted(example.candidates.tolist()) == list(range(5, 15)) for example in examples)
    assert len({tuple(example.candidates.tolist()) for example in examples}) == 3


def test_pools_of_random_negatives_share_history_and_target():
    """What is computed once in training: the same history stands behind each other in the examples."""
    examples = sample_examples(sequences([1, 2, 3]), RandomPools(40, 20, pools=2), seed=0)
    assert [len(example.history) for example in examples] in ([1, 1, 2, 2], [2, 2, 1, 1])
    assert len({tuple(example.candidates.tolist()) for example in examples}) == 4


@pytest.mark.parametrize("pools", [RANDOM, RandomPools(40, 20, pools=2), RetrievedPools(ten_from(2))])
def test_no_user_gets_more_than_a_users_share(pools: RandomPools):
    """A sequence of 39 beside one of 4: 3 of each at most, and another choice of positions with another seed."""
    training = sequences(list(range(1, 40)), [1, 2, 3, 4])
    examples = sample_examples(training, pools, per_user=3, seed=0)
    counted = [sum(example.history[0] == 1 and len(example.history) > 3 for example in examples), len(examples)]
    assert counted[1] == 6
    assert counted[0] <= 3
    other = sample_examples(training, pools, per_user=3, seed=1)
    assert prefixes(other) != prefixes(examples)


def test_the_retriever_is_asked_about_what_came_before_and_nothing_else():
    """A position holds user, history and target; the list is made from the history of that user."""
    asked: list[Position] = []

    def lists(positions: list[Position]) -> list[np.ndarray]:
        asked.extend(positions)
        return [np.array([position.target, 30], np.int32) for position in positions]

    sample_examples(sequences([7, 8, 9], [5, 6]), RetrievedPools(lists), seed=0)
    assert sorted((p.user, p.history.tolist(), p.target) for p in asked) == [(0, [7], 8), (0, [7, 8], 9), (1, [5], 6)]


def test_sequences_without_a_next_item_are_refused():
    """A user with one item has nothing to predict; with nobody else there is nothing to train on."""
    with pytest.raises(InputError, match="2 items to train on"):
        sample_examples(sequences([1], []), RANDOM, seed=0)


def test_a_retriever_that_finds_nothing_is_refused():
    """No list holds a target: there is nothing to learn from, and the sentence says what else to do."""
    with pytest.raises(InputError, match=r"none of 2 training positions .* random negatives"):
        sample_examples(sequences([1, 2, 3]), RetrievedPools(ten_from(20)), seed=0)


def test_candidates_grow_from_five_to_all_around_the_target():
    """Ten of twenty candidates each: 5 of them up to .35 of the way (places 0 to 3 of 9), then more.

    Place 6 of 9 is at .667, .317 / .65 of the way from there to the end: 5 + 15 * .487 = 12.3, so 12.
    """
    examples = [Example(np.array([1]), np.arange(100, 120, dtype=np.int32), 19 - number) for number in range(10)]
    grown = growing(examples, fewest=5, start=0.35)
    assert [len(example.candidates) for example in grown] == [5] * 4 + [7, 9, 12, 14, 17, 20]
    for before, after in zip(examples, grown, strict=True):
        assert after.candidates[after.truth] == before.candidates[before.truth]
        assert (np.diff(after.candidates) > 0).all()
    assert grown[0].candidates.tolist() == [100, 106, 112, 118, 119]  # four of the other 19, from first to last


TITLES = ["Opi Nail Lacquer, Red", "Opi Nail Lacquer, Blue", "Garlic Soap", "Rose Soap", "Comb", "Brush"]


def catalogue(titles: list[str]) -> Catalogue:
    ids = [str(number).encode() for number in range(len(titles))]
    return Catalogue(ids, titles, [1] * len(titles))


def test_nearness_of_titles():
    """1 for the same words in any order and case, 0 for none in common; one shared word ties less than three."""
    near = TitleNearness(catalogue([*TITLES, "lacquer: nail red OPI"]))
    found = near(np.array([1, 2, 3]), np.array([7, 4, 5]))
    assert found.shape == (3, 3)
    assert found[0, 0] == pytest.approx(1)
    assert found[1, 0] > found[2, 1] > 0
    assert found[:, 2].tolist() == [0, 0, 0]


def test_nearness_is_the_cosine_of_tf_idf():
    """By hand, smoothed as in scikit-learn's documentation: idf = ln((1 + n) / (1 + df)) + 1, n 3 with the padding."""
    near = TitleNearness(catalogue(["a b", "a c"]))
    common, rare = np.log(4 / 3) + 1, np.log(4 / 2) + 1
    assert near(np.array([1]), np.array([2]))[0, 0] == pytest.approx(common**2 / (common**2 + rare**2))


def test_only_what_the_titles_give_away_is_kept():
    """Behind the red lacquer (1) the blue one (2) is the nearest title; the rose soap (4) is like nothing shown."""
    evident = EvidentPools(RandomPools(6, 6), TitleNearness(catalogue(TITLES)), history=2)
    examples = sample_examples(sequences([1, 2], [1, 4], [3, 5, 6, 4]), evident, seed=0)
    assert prefixes(examples) == [[1, 2]]
