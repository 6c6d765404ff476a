"""The retriever's weight and the temperature, fitted to the users' true items, by hand."""

import math

import numpy as np
import pytest

from models.ranker.fitting.fusion_fit import fit_fusion


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
