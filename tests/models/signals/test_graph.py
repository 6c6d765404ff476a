"""Graphs of items: how recency and edges are combined, by hand and against a loop."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array

from models.signals.graph import ItemGraph
from models.sparse import SparseRows


def graph_of(edges: np.ndarray) -> ItemGraph:
    """Return the graph whose edges [from, to] are these."""
    rows = csr_array(edges)
    return ItemGraph(
        SparseRows(rows.indptr.astype(np.int64), rows.indices.astype(np.int32), rows.data.astype(np.float32))
    )


def test_recency_by_hand():
    """From the latest item 1 the edge of 4 weighs 1, from the one before it, 2, that of 6 weighs 1/2: 4 + 3.

    An edge leads to item 4 from item 2 alone: 1/2. None leads to item 5.
    """
    edges = np.zeros((6, 6))
    edges[1, 3], edges[2, 3], edges[2, 4] = 4, 6, 1
    found = graph_of(edges)(np.array([5, 3, 4], np.int32), np.array([1, 2], np.int32))
    assert found.tolist() == [0, 7, 0.5]


def test_an_item_seen_twice_counts_twice():
    """By hand: item 1 is the latest and the third-latest item, so that an edge of 3 weighs 1 + 1/3."""
    edges = np.zeros((4, 4))
    edges[1, 3] = 3
    found = graph_of(edges)(np.array([3], np.int32), np.array([1, 2, 1], np.int32))
    assert found.tolist() == pytest.approx([3 + 1])


def test_no_edge_leads_from_rows_beyond_the_end():
    """A history item that came into the catalogue after the counts tells nothing, and neither does no history."""
    edges = np.zeros((3, 3))
    edges[1, 2] = 5
    graph = graph_of(edges)
    items = np.array([2, 7], np.int32)
    assert graph(items, np.array([3, 90, 1], np.int32)).tolist() == pytest.approx([5 / 3, 0])
    assert graph(items, np.empty(0, np.int32)).tolist() == [0, 0]
    assert graph(np.empty(0, np.int32), np.array([1], np.int32)).tolist() == []
    assert ItemGraph(SparseRows.empty())(items, np.array([1, 2], np.int32)).tolist() == [0, 0]


@given(st.integers(0, 1 << 30), st.lists(st.integers(0, 9), max_size=6), st.permutations(range(1, 10)))
def test_it_equals_the_sum_over_the_history(seed, recent, items):
    """The reference is a loop over history and items on the dense edges, for items in any order."""
    rng = np.random.default_rng(seed)
    edges = np.where(rng.random((10, 10)) < 0.4, rng.integers(1, 20, (10, 10)), 0)
    some = items[: int(rng.integers(0, 10))]
    expected = [sum(edges[before, item] / n for n, before in enumerate(recent, start=1)) for item in some]
    found = graph_of(edges)(np.array(some, np.int32), np.array(recent, np.int32))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
