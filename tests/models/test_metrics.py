"""The ranking metrics, against values worked out by hand."""

import math

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given
from hypothesis import strategies as st

from models.metrics import CUTOFFS, mrr, ndcg, recall, summary
from models.retriever.candidates import place_of, top_candidates


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
    """Rank 6 is outside @5, and rank 0 means not ranked: both are misses by definition."""
    assert measure([6, 0], 5) == 0.0


def test_the_metrics_agree_with_trec_eval():
    """The reference is NIST's trec_eval: all six metrics agree within 1e-6.

    It gets the lists of 300 random users, on 60 items of which 10 are masked. The average precision of one relevant
    item is its reciprocal rank, and of the two trec_eval cuts only the former at k.
    """
    rng = np.random.default_rng(5)
    ranks, lists, truths = [], {}, {}
    for user in range(300):
        scores = rng.integers(0, 20, 61).astype(np.float32)  # with ties
        truth, *masked = rng.choice(np.arange(1, 61), 11, replace=False)
        listed = top_candidates(
            scores, np.array([truth, *masked[:9]] if user % 10 == 0 else masked, np.int32), 20
        ).items
        ranks.append(place_of(scores, truth))
        # trec_eval sorts by score and has another rule for ties, so the scores given to it only encode the order.
        lists[str(user)] = {str(item): -float(place) for place, item in enumerate(listed)}
        truths[str(user)] = {str(truth): 1}
    found = summary(ranks)
    for k in CUTOFFS:
        measured = pytrec_eval.RelevanceEvaluator(truths, {f"recall.{k}", f"ndcg_cut.{k}", f"map_cut.{k}"})
        users = measured.evaluate(lists).values()
        for ours, theirs in (("Recall", "recall"), ("NDCG", "ndcg_cut"), ("MRR", "map_cut")):
            expected = np.mean([user[f"{theirs}_{k}"] for user in users])
            assert found[f"{ours}@{k}"] == pytest.approx(expected, abs=1e-6)
    assert 0 < found["MRR@5"] < found["Recall@10"] < 1


@given(st.lists(st.integers(0, 30), min_size=1), st.sampled_from([5, 10]))
def test_the_metrics_are_ordered(ranks, k):
    """For one relevant item 1/r <= 1/log2(r + 1) <= 1, so MRR <= NDCG <= Recall for any ranks."""
    assert mrr(ranks, k) <= ndcg(ranks, k) + 1e-12
    assert ndcg(ranks, k) <= recall(ranks, k) + 1e-12


def test_no_users_is_an_error():
    """A mean over no users would be NaN; the caller must pass at least one user."""
    with pytest.raises(ValueError, match="at least one user"):
        summary([])
