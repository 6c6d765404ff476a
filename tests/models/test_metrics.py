"""The ranking metrics, against values worked out by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.metrics import mrr, ndcg, recall, summary


def test_ndcg_matches_hand_computation():
    """One relevant item at rank 3: NDCG@5 = 1 / log2(3 + 1) = 0.5 (Jarvelin and Kekalainen 2002)."""
    assert ndcg([3], k=5) == pytest.approx(0.5)


def test_metrics_of_three_users_by_hand():
    """Ranks 1, 4 and none: Recall@5 = 2/3, MRR@5 = (1 + 1/4) / 3, NDCG@5 = (1 + 1/log2(5)) / 3."""
    ranks = [1, 4, 0]
    assert recall(ranks, 5) == pytest.approx(2 / 3)
    assert mrr(ranks, 5) == pytest.approx(1.25 / 3)
    assert ndcg(ranks, 5) == pytest.approx((1 + 1 / math.log2(5)) / 3)


@pytest.mark.parametrize("measure", [mrr, ndcg, recall])
def test_a_rank_beyond_the_cut_and_a_missing_one_count_nothing(measure):
    """Rank 6 is outside @5, rank 0 means not ranked: both are misses by definition."""
    assert measure([6, 0], 5) == 0.0


@given(st.lists(st.integers(0, 30), min_size=1), st.sampled_from([5, 10]))
def test_the_metrics_are_ordered(ranks, k):
    """For one relevant item 1/r <= 1/log2(r + 1) <= 1, so MRR <= NDCG <= Recall for any ranks."""
    assert mrr(ranks, k) <= ndcg(ranks, k) + 1e-12
    assert ndcg(ranks, k) <= recall(ranks, k) + 1e-12


def test_no_users_is_an_error():
    """A mean over nobody would be NaN; the caller must say what it measures."""
    with pytest.raises(ValueError, match="at least one user"):
        summary([])
