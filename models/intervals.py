"""Bootstrap intervals of differences between two ways to rank the same users."""

import numpy as np
from numpy.typing import NDArray


def bootstrap(differences: NDArray[np.float64], repeats: int = 5000, seed: int = 0) -> tuple[float, float, float]:
    """Return the mean of the users' paired differences and its 95 % interval.

    The interval is that of the percentiles over users drawn with replacement.
    """
    from scipy.stats import bootstrap as resample  # not for a serving process, which reads the metrics' module only

    rng = np.random.default_rng(seed)
    drawn = resample((differences,), np.mean, n_resamples=repeats, batch=100, method="percentile", random_state=rng)
    low, high = drawn.confidence_interval
    return float(differences.mean()), float(low), float(high)


def interval(differences: NDArray[np.float64]) -> str:
    """Return the mean difference and its 95 % interval as tables show them."""
    return "{:+.4f} [{:+.4f}, {:+.4f}]".format(*bootstrap(differences))
