"""The bootstrap interval of the users' paired differences."""

import numpy as np
import pytest

from models.intervals import bootstrap, resampled_ratios


def test_bootstrap_is_the_interval_of_the_normal_approximation():
    """400 differences of mean .1 and deviation .5: .1 +- 1.96 * .5 / 20; the same seed gives the same interval."""
    rng = np.random.default_rng(0)
    differences = rng.normal(size=400)
    differences = 0.1 + 0.5 * (differences - differences.mean()) / differences.std()
    mean, low, high = bootstrap(differences)
    assert mean == pytest.approx(0.1)
    assert (low, high) == pytest.approx((0.1 - 0.049, 0.1 + 0.049), abs=0.005)
    assert bootstrap(differences) == (mean, low, high)
    assert bootstrap(np.zeros(10)) == (0.0, 0.0, 0.0)


def test_ratios_of_users_drawn_with_replacement():
    """Two users, 1 of 1 and 0 of 3: drawn with replacement, the ratio is 1 or 0 a quarter of the time each, else 1/4. A
    user without a denominator leaves NaN where only this one is drawn.
    """
    sums, counts = np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[1.0, 0.0], [3.0, 4.0]])
    draws = resampled_ratios(sums, counts, repeats=4000)
    assert draws.shape == (4000, 2)
    found, times = np.unique(draws[:, 0], return_counts=True)
    assert found.tolist() == [0, 0.25, 1]
    assert times / 4000 == pytest.approx([0.25, 0.5, 0.25], abs=0.04)
    assert np.isnan(draws[:, 1]).mean() == pytest.approx(0.25, abs=0.04)
    assert set(draws[~np.isnan(draws[:, 1]), 1]) == {0.5}


def test_users_who_are_alike_are_still_drawn_one_by_one():
    """400 users, half of them with a hit: the deviation of the share is sqrt(.25 / 400) = 0.025."""
    hits = (np.arange(400) % 2).astype(float)[:, np.newaxis]
    draws = resampled_ratios(hits, np.ones((400, 1)))
    assert draws.mean() == pytest.approx(0.5, abs=0.003)
    assert draws.std() == pytest.approx(0.025, rel=0.1)
