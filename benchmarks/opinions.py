"""What each opinion on the candidates adds to the others: log-linear pools whose weights are fitted on validation.

The served list weighs two opinions, the retriever's and the language model's, by one number. Here any set of them is
weighed by what explains the validation users' true items best (a conditional logit; McFadden 1974), so that what one
adds to a set is told apart from what stands in the set already.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from models.ranker.fusion import true_places

Floats = NDArray[np.float64]
PENALTY = 1e-3
"""Of the squared weights in the loss: keeps the weight of an opinion that says the same for every candidate finite."""


def fit_weights(opinions: Floats, truths: Sequence[int]) -> Floats:
    """The weight of each opinion that makes the true items most probable.

    Args:
        opinions: [users, k, opinions] of each candidate, on any scale.
        truths: place (from 0) of each user's true item.

    Returns:
        [opinions].
    """
    users = np.arange(len(truths))
    centred = opinions - opinions[users, list(truths)][:, None]  # [users, k, opinions]

    def loss(weights: Floats) -> tuple[float, Floats]:
        logits = centred @ weights  # [users, k], the true item's 0
        normaliser = np.logaddexp.reduce(logits, axis=1)
        expected = np.einsum("uk,uko->uo", np.exp(logits - normaliser[:, None]), centred)
        gradient = expected.mean(axis=0) + 2 * PENALTY * weights
        return float(normaliser.mean() + PENALTY * (weights**2).sum()), gradient

    fitted: Floats = minimize(loss, np.zeros(opinions.shape[-1]), jac=True).x
    return fitted


def pooled_ranks(
    validation: Mapping[str, Floats], truths: Sequence[int], test: Mapping[str, Floats], test_truths: Sequence[int]
) -> NDArray[np.int64]:
    """Place (from 1) of each test user's true item in the pool of these opinions, weighed on validation.

    Args:
        validation: each opinion [users, k], candidates in the retriever's order, which decides between equals.
        truths: place (from 0) of each validation user's true item.
        test: the same opinions of the test users.
        test_truths: place (from 0) of each test user's true item.
    """
    weights = fit_weights(np.stack([*validation.values()], axis=-1), truths)
    return true_places(np.stack([test[name] for name in validation], axis=-1) @ weights, test_truths)
