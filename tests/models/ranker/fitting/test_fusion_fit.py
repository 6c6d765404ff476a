"""The retriever's weight and the temperature, fitted to the users' true items, by hand."""

import math

import numpy as np
import pytest

from models.ranker.fitting.fusion_fit import expected_gain, fit_fusion, fit_served


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


def test_the_expected_gain_is_that_of_users_who_took_no_part_in_the_fit():
    """A language model that is always right where the retriever puts the truth third gains 1 - 1 / log2(4) = 1/2.

    All users alike have an interval of no width.
    """
    scores = [np.array([2.0, 1.0, 0.0])] * 20
    gain = expected_gain([np.array([0.0, 0.0, 9.0])] * 20, scores, [2] * 20)
    assert gain == pytest.approx((0.5, 0.5, 0.5))


def test_a_weight_fitted_to_chance_shows_no_gain():
    """A random language model and a retriever that is mostly right: the interval contains 0 and is narrow.

    Fitted and judged on the same users, the weight could only gain.
    """
    draw = np.random.default_rng(0)
    truths = draw.choice(5, 100, p=[0.6, 0.2, 0.1, 0.05, 0.05]).tolist()
    gain = expected_gain(list(draw.normal(size=(100, 5))), [np.log([0.6, 0.2, 0.1, 0.05, 0.05])] * 100, truths)
    assert gain.low <= 0 <= gain.high
    assert gain.high - gain.low < 0.05


def test_one_user_tells_no_gain():
    assert expected_gain([np.zeros(3)], [np.zeros(3)], [0]) is None


def test_a_list_that_is_expected_to_be_worse_is_not_served():
    """The language model saves 10 users for whom the retriever is wrong by far, and misleads 90 by a little.

    The likelihood is better with the language model and NDCG@10 is worse: 90 true items drop from first to second place
    and 10 rise, which is -0.8 (1 - 1 / log2(3)) on average.
    """
    scores = [np.array([0.01, 0.0])] * 90 + [np.array([0.0, -5.0])] * 10
    model, truths = [np.array([-0.1, 0.0])] * 90 + [np.array([-3.0, 0.0])] * 10, [0] * 90 + [1] * 10
    assert fit_fusion(model, scores, truths)[0] < 0.5
    gain = expected_gain(model, scores, truths)
    assert gain.mean == pytest.approx(-0.8 * (1 - 1 / math.log2(3)))
    assert gain.high < 0
    assert fit_served(model, scores, truths, gain)[0] == 1.0
    assert fit_served(model, scores, truths, None) == fit_fusion(model, scores, truths)
