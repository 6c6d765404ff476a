"""Transitions between items: how recency and counts are combined, by hand and against a loop."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array

from models.signals.transitions import Transitions
from models.sparse import SparseRows


def transitions_of(counts: np.ndarray) -> Transitions:
    """Return the transitions whose counts [earlier, later] are these."""
    rows = csr_array(counts)
    return Transitions(
        SparseRows(rows.indptr.astype(np.int64), rows.indices.astype(np.int32), rows.data.astype(np.float32))
    )


def test_recency_by_hand():
    """From the latest item 1 the count of 4 weighs 1, from the one before it, 2, that of 6 weighs 1/2: log(1 + 7).

    Item 4 followed item 2 alone, 1 time: log(1 + 1/2). Item 5 followed neither, so it gets log(1 + 0).
    """
    counts = np.zeros((6, 6))
    counts[1, 3], counts[2, 3], counts[2, 4] = 4, 6, 1
    found = transitions_of(counts)(np.array([5, 3, 4], np.int32), np.array([1, 2], np.int32))
    assert found.tolist() == pytest.approx([0, np.log(8), np.log(1.5)])


def test_an_item_seen_twice_counts_twice():
    """By hand: item 1 is the latest and the third-latest item, so that a count of 3 weighs 1 + 1/3."""
    counts = np.zeros((4, 4))
    counts[1, 3] = 3
    found = transitions_of(counts)(np.array([3], np.int32), np.array([1, 2, 1], np.int32))
    assert found.tolist() == pytest.approx([np.log1p(3 + 1)])


def test_rows_beyond_the_end_have_no_followers():
    """A history item that came into the catalogue after the counts tells nothing, and neither does no history."""
    counts = np.zeros((3, 3))
    counts[1, 2] = 5
    transitions = transitions_of(counts)
    items = np.array([2, 7], np.int32)
    assert transitions(items, np.array([3, 90, 1], np.int32)).tolist() == pytest.approx([np.log1p(5 / 3), 0])
    assert transitions(items, np.empty(0, np.int32)).tolist() == [0, 0]
    assert transitions(np.empty(0, np.int32), np.array([1], np.int32)).tolist() == []


@given(st.integers(0, 1 << 30), st.lists(st.integers(0, 9), max_size=6), st.permutations(range(1, 10)))
def test_it_equals_the_sum_over_the_history(seed, recent, items):
    """The reference is a loop over history and items on the dense counts, for items in any order."""
    rng = np.random.default_rng(seed)
    counts = np.where(rng.random((10, 10)) < 0.4, rng.integers(1, 20, (10, 10)), 0)
    some = items[: int(rng.integers(0, 10))]
    expected = [np.log1p(sum(counts[before, item] / n for n, before in enumerate(recent, start=1))) for item in some]
    found = transitions_of(counts)(np.array(some, np.int32), np.array(recent, np.int32))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
