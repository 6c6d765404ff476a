"""Fits the weights of several sources of scores by likelihood (a conditional logit; McFadden 1974)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Floats = NDArray[np.float64]
PENALTY = 1e-4
"""Factor of the squared weights in the loss; it keeps the weight of a source that is never wrong finite."""


def fit_pool(sources: Sequence[Floats], truths: Sequence[int]) -> Floats:
    """Return the non-negative weights under which the true items are most probable.

    Args:
        sources: scores of each user's candidates [k, sources], on any scale; k may differ from user to user.
        truths: position (from 0) of each user's true item.

    Returns:
        the weights [sources]; 0 for a source that does not help.
    """
    lengths = [len(user) for user in sources]
    starts = np.cumsum([0, *lengths[:-1]])
    # Scores relative to the true item, whose logit is then 0 for any weights.
    relative = np.concatenate([user - user[truth] for user, truth in zip(sources, truths, strict=True)])

    def loss(weights: Floats) -> tuple[float, Floats]:
        logits = relative @ weights  # [candidates of all users]
        normaliser = np.logaddexp.reduceat(logits, starts)  # [users]
        probabilities = np.exp(logits - np.repeat(normaliser, lengths))
        gradient = probabilities @ relative / len(truths) + 2 * PENALTY * weights
        return float(normaliser.mean() + PENALTY * weights @ weights), gradient

    count = relative.shape[1]
    fitted: Floats = minimize(loss, np.zeros(count), jac=True, method="L-BFGS-B", bounds=[(0, None)] * count).x
    return fitted
