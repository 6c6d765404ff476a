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


def resampled_ratios(
    sums: NDArray[np.float64], counts: NDArray[np.float64], repeats: int = 2000, seed: int = 0
) -> NDArray[np.float64]:
    """Return ratios of totals for users drawn with replacement: the bootstrap of clusters (Field and Welsh 2007).

    All that a user did is drawn or left out together, because the answers to one user resemble each other. The
    percentiles of a column are the interval of its ratio, those of a difference of columns that of the difference, and
    it does not matter whether both columns have the same users.

    Args:
        sums: numerators of each user, [users, ratios].
        counts: denominators of each user, [users, ratios].
        repeats: number of draws.
        seed: of the draws.

    Returns:
        [repeats, ratios]; NaN where a draw has no denominator.
    """
    width = sums.shape[1]
    # Users with the same figures are drawn together, and most of a service's users are such.
    rows, alike = np.unique(np.hstack([sums, counts]), axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    batch = max(1, 4_000_000 // len(rows))
    totals = []  # of [batch, 2 * ratios]
    for start in range(0, repeats, batch):
        drawn = rng.multinomial(alike.sum(), alike / alike.sum(), size=min(batch, repeats - start))
        totals.append(drawn @ rows)
    total = np.concatenate(totals)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios: NDArray[np.float64] = np.where(total[:, width:] > 0, total[:, :width] / total[:, width:], np.nan)
    return ratios
