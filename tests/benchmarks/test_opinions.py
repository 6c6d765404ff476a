"""Pools of several opinions on the candidates: weights against scikit-learn, ranks counted by hand."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from benchmarks.opinions import PENALTY, fit_weights, pooled_ranks


def test_weights_between_two_candidates_are_logistic_regressions():
    """With two candidates a conditional logit is a logistic regression, without intercept, on their differences."""
    rng = np.random.default_rng(0)
    users = 400
    opinions = rng.normal(size=(users, 2, 3))
    chances = 1 / (1 + np.exp(-(opinions[:, 1] - opinions[:, 0]) @ [1.5, -0.5, 0.0]))
    truths = (rng.random(users) < chances).astype(int)
    theirs = LogisticRegression(C=1 / (2 * PENALTY * users), fit_intercept=False, tol=1e-9)
    theirs.fit(opinions[:, 1] - opinions[:, 0], truths)
    assert fit_weights(opinions, list(truths)) == pytest.approx(theirs.coef_[0], abs=1e-4)


def test_what_is_worth_nothing_on_validation_says_nothing_on_test():
    """One opinion names every true item of validation, one is the same for all candidates: the first alone ranks."""
    truths = [0, 1, 2, 1]
    knows, silent = np.eye(3)[truths], np.ones((4, 3))
    test = {"knows": np.array([[0.0, 3.0, 1.0]]), "silent": np.array([[9.0, 0.0, 0.0]])}
    ranks = [pooled_ranks({"knows": knows, "silent": silent}, truths, test, [place]).tolist() for place in range(3)]
    assert ranks == [[3], [1], [2]]


def test_equals_keep_the_retrievers_order():
    """An opinion that says nothing leaves the candidates as they come: places 1, 2, 3."""
    nothing = {"silent": np.zeros((3, 3))}
    assert pooled_ranks(nothing, [0, 1, 2], nothing, [0, 1, 2]).tolist() == [1, 2, 3]
