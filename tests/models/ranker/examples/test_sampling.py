"""Training examples: which items they may contain, and that they are reproducible."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.ranker.examples.sampling import Example, Position, RandomPools, RetrievedPools, sample_examples
from models.retriever.candidates import Candidates
from preprocessing.errors import InputError

RANDOM = RandomPools(items=40, candidates=20)


def sequences(*rows: list[int]) -> list[np.ndarray]:
    return [np.array(row, np.int32) for row in rows]


def as_lists(examples: list[Example]) -> list[tuple[list[int], list[int], int]]:
    return [(example.history.tolist(), example.candidates.tolist(), example.truth) for example in examples]


def prefixes(examples: list[Example]) -> list[list[int]]:
    return sorted([*example.history.tolist(), int(example.candidates[example.truth])] for example in examples)


def listed(*items: int) -> Candidates:
    """Return a retriever's list in which the score of an item is its number divided by 100."""
    row = np.array(items, np.int32)
    return Candidates(row, (row / 100).astype(np.float32), np.arange(1, len(row) + 1, dtype=np.int32))


def ten_from(first: int):
    """Return a retriever that lists the ten items from ``first`` on for every history."""
    return lambda positions: [listed(*range(first, first + 10))] * len(positions)


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
    """There are 20 distinct candidates, or all that the catalogue of 40 allows; only the target is from the prefix."""
    for example in sample_examples(sequences(*rows), RANDOM, count=count, seed=seed):
        target = int(example.candidates[example.truth])
        prefix = {*example.history.tolist(), target}
        candidates = example.candidates.tolist()
        assert len(set(candidates)) == len(candidates) == min(20, 40 - len(prefix) + 1)
        assert prefix & set(candidates) == {target}


def test_sampling_repeats_with_its_seed_and_only_then():
    """The same seed gives the same examples in the same order; another seed does not."""
    training = sequences(list(range(1, 20)), list(range(20, 40)))
    first, again, other = (as_lists(sample_examples(training, RANDOM, count=8, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_truths_are_spread_over_the_letters():
    """Candidates are shuffled: in 400 examples each of 20 places holds the truth 20 times on average, never below 5."""
    training = sequences(*([list(range(1, 6))] * 100))
    places = [example.truth for example in sample_examples(training, RANDOM, seed=0)]
    assert np.bincount(places, minlength=20).min() >= 5


def test_a_users_later_items_are_negatives_like_any():
    """A user's later items may be negatives, because leaving them out would give them away.

    After item 3 alone, 19 of the 38 other items are drawn, so item 5 is in half of the lists.
    """
    lists = [
        example.candidates
        for seed in range(60)
        for example in sample_examples(sequences([3, 4, 5]), RANDOM, seed=seed)
        if len(example.history) == 1
    ]
    assert len(lists) == 60
    assert 15 < sum(5 in candidates for candidates in lists) < 45


def test_retrieved_lists_are_used_as_they_are_where_they_hold_the_target():
    """The list 5..14 has the targets 5 and 14, at places 0 and 9, and stays unchanged; it lacks targets 2 and 3."""
    pools = RetrievedPools(ten_from(5), "retriever")
    examples = sample_examples(sequences([1, 2, 3], [1, 5], [1, 14]), pools, seed=0)
    assert sorted(as_lists(examples)) == [([1], list(range(5, 15)), 0), ([1], list(range(5, 15)), 9)]


def test_shuffled_lists_hold_the_same_items_in_other_orders():
    """Three pools of one position have the same history and ten candidates; the truth is at its shuffled place."""
    pools = RetrievedPools(ten_from(5), "shuffled", pools=3)
    examples = sample_examples(sequences([1, 8]), pools, seed=0)
    assert len(examples) == 3
    assert prefixes(examples) == [[1, 8]] * 3
    assert all(sorted(example.candidates.tolist()) == list(range(5, 15)) for example in examples)
    assert len({tuple(example.candidates.tolist()) for example in examples}) == 3


def test_candidates_are_drawn_from_a_long_list():
    """An example has the target 8 at any place, and three distinct other items of the list 5..14 with their scores.

    Each of the nine others is drawn in a third of 600 examples, within five standard errors (.096).
    """
    pools = RetrievedPools(ten_from(5), "shuffled", pools=600, drawn=4)
    examples = sample_examples(sequences([1, 8]), pools, seed=0)
    assert len(examples) == 600
    for example in examples:
        assert len(set(example.candidates.tolist())) == 4
        assert example.candidates[example.truth] == 8
        assert example.scores == pytest.approx(example.candidates / 100)
    drawn = np.bincount(np.concatenate([example.candidates for example in examples]), minlength=15)[5:15] / 600
    assert np.delete(drawn, 3) == pytest.approx(np.full(9, 1 / 3), abs=0.097)
    places = np.bincount([example.truth for example in examples], minlength=4) / 600
    assert places == pytest.approx(np.full(4, 0.25), abs=0.089)


def test_a_list_that_is_not_longer_is_taken_whole():
    """Twelve candidates cannot be drawn from ten: the example has all of them."""
    (example,) = sample_examples(sequences([1, 8]), RetrievedPools(ten_from(5), "shuffled", drawn=12), seed=0)
    assert sorted(example.candidates.tolist()) == list(range(5, 15))


@pytest.mark.parametrize("order", ["retriever", "shuffled"])
def test_each_candidate_keeps_the_retrievers_score(order: str):
    """A candidate's score is its number divided by 100 at any place; random candidates have no scores and get zeros."""
    for example in sample_examples(sequences([1, 8], [2, 11]), RetrievedPools(ten_from(5), order), seed=0):  # type: ignore[arg-type]
        assert example.scores == pytest.approx(example.candidates / 100)
    for example in sample_examples(sequences([1, 8]), RANDOM, seed=0):
        assert example.scores.tolist() == [0] * 20


def test_popular_negatives_are_drawn_by_their_counts():
    """Negatives are drawn by the counts 0, 6, 3 and 1 of the items other than the target, whose count is 5.

    As the only negative in 2,000 examples, items 3, 4 and 5 have shares of .6, .3 and .1 within five standard errors
    (.055), and item 2, which has no interactions, is never drawn.
    """
    pools = RandomPools(5, 2, counts=[5, 0, 6, 3, 1])
    examples = [example for seed in range(2000) for example in sample_examples(sequences([1, 1]), pools, seed=seed)]
    drawn = np.bincount([sum(example.candidates.tolist()) - 1 for example in examples], minlength=6) / len(examples)
    assert drawn[1:3].tolist() == [0, 0]
    assert drawn[3:] == pytest.approx([0.6, 0.3, 0.1], abs=0.055)


def test_a_small_catalogue_is_drawn_whole():
    """With four other items for nineteen places, each is drawn exactly once, including the item with a count of 0."""
    for counts in (None, [5, 0, 6, 3, 1]):
        (example,) = sample_examples(sequences([1, 1]), RandomPools(5, 20, counts=counts), seed=0)
        assert sorted(example.candidates.tolist()) == [1, 2, 3, 4, 5]


def test_pools_of_random_negatives_share_history_and_target():
    """Examples with the same history follow one another, so that training computes the history once."""
    examples = sample_examples(sequences([1, 2, 3]), RandomPools(40, 20, pools=2), seed=0)
    assert [len(example.history) for example in examples] in ([1, 1, 2, 2], [2, 2, 1, 1])
    assert len({tuple(example.candidates.tolist()) for example in examples}) == 4


@pytest.mark.parametrize("pools", [RANDOM, RandomPools(40, 20, pools=2), RetrievedPools(ten_from(2))])
def test_no_user_gets_more_than_a_users_share(pools: RandomPools):
    """Sequences of 39 and of 4 items give at most 3 examples each; another seed chooses other positions."""
    training = sequences(list(range(1, 40)), [1, 2, 3, 4])
    examples = sample_examples(training, pools, per_user=3, seed=0)
    counted = [sum(example.history[0] == 1 and len(example.history) > 3 for example in examples), len(examples)]
    assert counted[1] == 6
    assert counted[0] <= 3
    other = sample_examples(training, pools, per_user=3, seed=1)
    assert prefixes(other) != prefixes(examples)


def test_the_retriever_is_asked_about_what_came_before_and_nothing_else():
    """The retriever receives user, history and target of each position; the list is made from that user's history."""
    asked: list[Position] = []

    def lists(positions: list[Position]) -> list[Candidates]:
        asked.extend(positions)
        return [listed(position.target, 30) for position in positions]

    sample_examples(sequences([7, 8, 9], [5, 6]), RetrievedPools(lists), seed=0)
    assert sorted((p.user, p.history.tolist(), p.target) for p in asked) == [(0, [7], 8), (0, [7, 8], 9), (1, [5], 6)]


def test_sequences_without_a_next_item_are_refused():
    """A user with one item has nothing to predict; without other users there is nothing to train on."""
    with pytest.raises(InputError, match="2 items to train on"):
        sample_examples(sequences([1], []), RANDOM, seed=0)


def test_a_retriever_that_finds_nothing_is_refused():
    """If no list contains a target, there is nothing to learn, and the error names an alternative."""
    with pytest.raises(InputError, match=r"none of 2 training positions .* random negatives"):
        sample_examples(sequences([1, 2, 3]), RetrievedPools(ten_from(20)), seed=0)
