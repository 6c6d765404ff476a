"""Weights of pooled score sources, fitted to the users' true items: compared with scikit-learn and by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from models.ranker.fitting.fusion_fit import PENALTY, fit_fusion, fit_pool
from models.ranker.fusion import fuse, log_softmax


def test_weights_between_two_candidates_are_logistic_regressions():
    """With two candidates, a conditional logit is a logistic regression without intercept on their differences."""
    rng = np.random.default_rng(0)
    users = 400
    sources = rng.normal(size=(users, 2, 3))
    differences = sources[:, 1] - sources[:, 0]
    truths = (rng.random(users) < 1 / (1 + np.exp(-differences @ [1.5, 0.5, 1.0]))).astype(int)
    theirs = LogisticRegression(C=1 / (2 * PENALTY * users), fit_intercept=False, tol=1e-9).fit(differences, truths)
    assert fit_pool(list(sources), list(truths)) == pytest.approx(theirs.coef_[0], abs=1e-4)


def test_what_is_wrong_or_silent_has_no_say():
    """A source that contradicts the truth, or scores all items equally, gets a weight of 0.

    In lists of two and three items, the first source scores every true item highest, the second source has the opposite
    scores, and the third source is constant.
    """
    knows = [np.eye(3)[0], np.eye(2)[1], np.eye(3)[2]]
    sources = [np.stack([row, -row, np.ones(len(row))], axis=-1) for row in knows]
    weights = fit_pool(sources, [0, 1, 2])
    assert weights[0] > 1
    assert weights[1:].tolist() == [0, 0]


def test_temperature_is_that_of_the_truth():
    """With a constant retriever, odds of 81 to 1 that are right 3 times of 4 are odds of 3 to 1: log 81 / 4 = log 3."""
    letters, scores = [np.array([math.log(81), 0.0])] * 4, [np.zeros(2)] * 4
    weight, temperature = fit_fusion(letters, scores, [0, 0, 0, 1])
    assert weight == 0.0
    assert temperature == pytest.approx(4.0, rel=0.05)


def test_a_language_model_that_tells_nothing_leaves_the_retriever_alone():
    """A language model that is constant or contradicts the truth gets no weight.

    If the retriever does not help either, its order is kept all the same.
    """
    scores = [np.array([1.0, 0.0, -1.0])] * 3
    assert fit_fusion([np.zeros(3)] * 3, scores, [0, 0, 1])[0] == 1.0
    assert fit_fusion([-row for row in scores], scores, [0, 0, 1])[0] == 1.0
    assert fit_fusion([np.zeros(3)] * 3, scores, [2, 2, 2]) == (1.0, 4.0)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_other_weight_or_temperature_explains_the_users_better(seed: int):
    """On a grid of weights that can be served, none has a better likelihood, less the penalty, than the fitted ones.

    The lists have 2 to 6 items, and the true items are drawn from both sources.
    """
    rng = np.random.default_rng(seed)
    model = [rng.normal(size=size) for size in rng.integers(2, 7, 40)]
    scores = [rng.normal(size=len(row)) for row in model]
    truths = [
        int(rng.choice(len(row), p=np.exp(fuse(row, prior, 0.5)))) for row, prior in zip(model, scores, strict=True)
    ]
    weights = fit_pool([np.stack([row, prior], axis=-1) for row, prior in zip(model, scores, strict=True)], truths)

    def loss(its_own: float, retrievers: float) -> float:
        users = zip(model, scores, truths, strict=True)
        likelihoods = [log_softmax(its_own * row + retrievers * prior)[truth] for row, prior, truth in users]
        return PENALTY * (its_own**2 + retrievers**2) - float(np.mean(likelihoods))

    best = loss(*weights)
    assert all(best <= loss(a, b) + 1e-6 for a in np.linspace(0, 2, 9) for b in np.linspace(0, 2, 9))
