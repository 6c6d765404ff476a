"""The bootstrap interval of the users' paired differences."""

import numpy as np
import pytest

from models.intervals import bootstrap


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
