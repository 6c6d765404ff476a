"""Weights of pooled score sources, fitted to the users' true items: compared with scikit-learn and by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from models.conditional_logit import PENALTY, fit_pool


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


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 4))
def test_no_other_weights_explain_the_users_better(seed: int, count: int):
    """No weights nearby and none of a wide range have a better likelihood, less the penalty, than the fitted ones.

    The loss is written out user by user. The pools have 1 to 9 items, the sources have different scales, and the true
    items are drawn by the first source.
    """
    rng = np.random.default_rng(seed)
    scales = 10.0 ** rng.integers(-1, 2, count)
    sources = [rng.normal(size=(size, count)) * scales for size in rng.integers(1, 10, 30)]
    truths = [
        int(rng.choice(len(user), p=np.exp(user[:, 0] / scales[0]) / np.exp(user[:, 0] / scales[0]).sum()))
        for user in sources
    ]

    def loss(weights: np.ndarray) -> float:
        logits = [user @ weights for user in sources]
        likelihoods = [row[truth] - np.log(np.exp(row).sum()) for row, truth in zip(logits, truths, strict=True)]
        return PENALTY * float((weights**2).sum()) - float(np.mean(likelihoods))

    weights = fit_pool(sources, truths)
    assert weights.shape == (count,)
    assert (weights >= 0).all()
    others = [np.maximum(weights + rng.normal(size=count) * step / scales, 0) for step in (0.01, 0.1, 1.0) * 5]
    others += [rng.uniform(0, 2, count) / scales for _ in range(40)]
    best = loss(weights)
    assert all(best <= loss(other) + 1e-6 for other in others)
