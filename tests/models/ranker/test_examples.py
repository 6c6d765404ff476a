"""Training examples: what they may hold and that they are reproducible."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.ranker.examples import Example, sample_examples
from preprocessing.errors import InputError

CATALOGUE = np.arange(1, 41, dtype=np.int32)


def sequences(*rows: list[int]) -> list[np.ndarray]:
    return [np.array(row, np.int32) for row in rows]


def as_lists(examples: list[Example]) -> list[tuple[list[int], list[int], int]]:
    return [(example.history.tolist(), example.candidates.tolist(), example.truth) for example in examples]


def test_every_prefix_of_two_or_more_is_one_example():
    """Sequences of 3, 1 and 2 items give the prefixes 1-2, 1-2-3 and 5-6, each once (paper, section 4.0.4)."""
    examples = sample_examples(sequences([1, 2, 3], [4], [5, 6]), CATALOGUE, count=None, seed=0)
    found = sorted([*example.history.tolist(), int(example.candidates[example.truth])] for example in examples)
    assert found == [[1, 2], [1, 2, 3], [5, 6]]


@given(
    rows=st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=30), min_size=1, max_size=5),
    count=st.integers(1, 20),
    seed=st.integers(0, 9),
)
def test_candidates_are_the_truth_and_items_outside_the_prefix(rows: list[list[int]], count: int, seed: int):
    """20 distinct candidates, or as many as the catalogue of 40 leaves; none but the truth is from the prefix."""
    for example in sample_examples(sequences(*rows), CATALOGUE, count=count, seed=seed):
        target = int(example.candidates[example.truth])
        prefix = {*example.history.tolist(), target}
        candidates = example.candidates.tolist()
        assert len(set(candidates)) == len(candidates) == min(20, 40 - len(prefix) + 1)
        assert prefix & set(candidates) == {target}


def test_sampling_repeats_with_its_seed_and_only_then():
    """The same seed gives the same examples in the same order; another one does not."""
    training = sequences(list(range(1, 20)), list(range(20, 40)))
    first, again, other = (as_lists(sample_examples(training, CATALOGUE, count=8, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_truths_are_spread_over_the_letters():
    """Shuffled candidates: over 400 examples each of 20 places holds the truth 20 times on average, never below 5."""
    training = sequences(*([list(range(1, 6))] * 100))
    places = [example.truth for example in sample_examples(training, CATALOGUE, count=None, seed=0)]
    assert np.bincount(places, minlength=20).min() >= 5


def test_negatives_follow_the_pool():
    """Only what the pool holds is drawn, and what it holds more often is drawn more often."""
    pool = np.array([10] * 50 + [11, 12, 13], np.int32)
    examples = sample_examples(sequences(*([[1, 2]] * 200)), pool, count=None, seed=0, candidates=2)
    negatives = [int(example.candidates[1 - example.truth]) for example in examples]
    assert set(negatives) <= {10, 11, 12, 13}
    assert negatives.count(10) > 150  # 189 expected


def test_sequences_without_a_next_item_are_refused():
    """A user with one item has nothing to predict; with nobody else there is nothing to train on."""
    with pytest.raises(InputError, match="2 items to train on"):
        sample_examples(sequences([1], []), CATALOGUE, count=None, seed=0)
