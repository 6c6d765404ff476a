"""Fusion of the letters' and the retriever's scores, and the order that results."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.ranker.fusion import WEIGHTS, fuse, fused_ranks, ndcg_by_weight, order

LOGITS = st.floats(-30, 30, width=32)


def test_fusion_by_hand():
    """Letters of 16:1, a retriever of 1:81 and a weight of 3/4 give the odds 16^(1/4) * (1/81)^(3/4) = 2/27."""
    letters, retriever = [math.log(16), 0.0], [0.0, math.log(81)]
    assert np.exp(fuse(letters, retriever, 0.75)) == pytest.approx([2 / 29, 27 / 29])


def test_weight_zero_is_the_letters_alone():
    """As in the paper, the retriever's scores change nothing, whatever they are."""
    assert np.exp(fuse([math.log(3), 0.0], [50.0, -np.inf], 0.0)) == pytest.approx([0.75, 0.25])


def test_an_item_unknown_to_the_retriever_is_neutral():
    """Two known candidates of equal logits have log 1/2 each; the unknown one gets their mean, so each has a third."""
    assert np.exp(fuse([0.0, 0.0, 0.0], [1.0, 1.0, -np.inf], 0.5)) == pytest.approx([1 / 3] * 3)
    assert np.exp(fuse([0.0, math.log(3)], [-np.inf, -np.inf], 0.5)) == pytest.approx([0.25, 0.75])


def test_ties_go_to_the_better_retriever_rank():
    """With equal probabilities, the retriever ranks 2, 0 (unknown) and 1 give the order 1, 2, unknown."""
    assert order([0.0, 0.0, 0.0], [2, 0, 1]).tolist() == [2, 0, 1]


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(LOGITS, st.one_of(LOGITS, st.just(-math.inf))), min_size=1, max_size=20),
    weight=st.floats(0, 1),
)
def test_fusion_is_a_distribution_over_the_candidates(rows: list[tuple[float, float]], weight: float):
    """Probabilities sum to 1 and the order is a permutation by descending probability, unknown items included."""
    letters, retriever = zip(*rows, strict=True)
    fused = fuse(letters, retriever, weight)
    assert np.exp(fused).sum() == pytest.approx(1.0)
    places = order(fused, np.arange(1, len(rows) + 1))
    assert sorted(places.tolist()) == list(range(len(rows)))
    assert (np.diff(fused[places]) <= 0).all()


def test_ndcg_by_weight():
    """The retriever alone is right about the one user, by 1.5 to 1: it outweighs the letters from weight .4 on."""
    letters, scores, truths = [np.array([0.0, 1.0])], [np.array([1.5, 0.0])], [0]
    second = 1 / math.log2(3)
    assert ndcg_by_weight(letters, scores, truths) == pytest.approx(
        {weight: second if weight < 0.4 else 1.0 for weight in WEIGHTS}
    )


@settings(deadline=None)
@given(
    users=st.lists(
        st.lists(st.tuples(LOGITS, st.one_of(LOGITS, st.just(-math.inf))), min_size=1, max_size=6),
        min_size=1,
        max_size=6,
    ),
    weight=st.sampled_from((0.0, 0.3, 1.0)),
)
def test_ranks_of_many_users_are_those_of_each(users: list[list[tuple[float, float]]], weight: float):
    """With lists of different lengths, unknown items and ties, ranks equal those that serving gives user by user."""
    letters = [np.array([letter for letter, _ in user]) for user in users]
    scores = [np.array([score for _, score in user]) for user in users]
    truths = [len(user) // 2 for user in users]
    expected = [
        order(fuse(row, prior, weight), np.arange(1, len(row) + 1)).tolist().index(truth) + 1
        for row, prior, truth in zip(letters, scores, truths, strict=True)
    ]
    assert fused_ranks(letters, scores, truths, weight).tolist() == expected
