"""How far each opinion on the candidates is trusted, fitted to validation users.

Opinions are pooled by weighted sums of log-probabilities (:func:`models.ranker.fusion.fuse`). The weights are those
that explain the users' true items best, a conditional logit (McFadden 1974), and not those of the best NDCG@10: a place
in a list jumps where a probability moves a little, so that the NDCG of some hundred users is best somewhere by chance
(``benchmarks/fusion_weights.py`` measures both).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize

from models.ranker.fusion import log_softmax

Floats = NDArray[np.float64]
PENALTY = 1e-4
"""Of the squared weights in the loss: keeps the weight of an opinion that is never wrong finite."""
TEMPERATURES = (0.25, 4.0)
"""The coldest and the hottest."""


def fit_pool(opinions: Sequence[Floats], truths: Sequence[int]) -> Floats:
    """The weights, none below 0, at which the true items are most probable.

    Args:
        opinions: of each user [k, opinions], on any scale; k may differ.
        truths: place (from 0) of each user's true item.

    Returns:
        [opinions]; 0 for one that does not help.
    """
    lengths = [len(user) for user in opinions]
    starts = np.cumsum([0, *lengths[:-1]])
    # Beside the true item: its own logit is 0 whatever the weights.
    beside = np.concatenate([user - user[truth] for user, truth in zip(opinions, truths, strict=True)])

    def loss(weights: Floats) -> tuple[float, Floats]:
        logits = beside @ weights  # [candidates of all users]
        normaliser = np.logaddexp.reduceat(logits, starts)  # [users]
        probabilities = np.exp(logits - np.repeat(normaliser, lengths))
        gradient = probabilities @ beside / len(truths) + 2 * PENALTY * weights
        return float(normaliser.mean() + PENALTY * weights @ weights), gradient

    count = beside.shape[1]
    fitted: Floats = minimize(loss, np.zeros(count), jac=True, method="L-BFGS-B", bounds=[(0, None)] * count).x
    return fitted


def fit_fusion(model: Sequence[ArrayLike], scores: Sequence[ArrayLike], truths: Sequence[int]) -> tuple[float, float]:
    """The retriever's weight and the temperature at which language model and retriever are served.

    A language model that tells nothing leaves weight 1, the retriever's own order. The temperature changes no ranking:
    served scores are to mean what they say (Guo et al. 2017).

    Args:
        model: the language model's log-probabilities [k] for each validation user.
        scores: retriever logits [k] of each.
        truths: place (from 0) of the true item among the candidates of each.
    """
    opinions = [
        np.stack([log_softmax(row), log_softmax(prior)], axis=-1) for row, prior in zip(model, scores, strict=True)
    ]
    its_own, retrievers = fit_pool(opinions, truths)
    total = its_own + retrievers
    if not total:
        return 1.0, TEMPERATURES[1]
    return round(float(retrievers / total), 3), round(float(np.clip(1 / total, *TEMPERATURES)), 3)
