"""Fits the weight of each source of scores in the final ranking, on validation users.

Sources are pooled by weighted sums of log-probabilities (:func:`models.ranker.fusion.fuse`). The fitted weights make
the users' true items most probable (a conditional logit; McFadden 1974) instead of maximising NDCG@10: a small change
of a probability can move a rank by several places, so with some hundred users the weight with the best NDCG is largely
a matter of chance (``experiments/fusion_weights.py`` measures both).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize

from models.ranker.fusion import log_softmax

Floats = NDArray[np.float64]
PENALTY = 1e-4
"""Factor of the squared weights in the loss; it keeps the weight of a source that is never wrong finite."""
TEMPERATURES = (0.25, 4.0)
"""Lowest and highest temperature."""


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


def fit_fusion(model: Sequence[ArrayLike], scores: Sequence[ArrayLike], truths: Sequence[int]) -> tuple[float, float]:
    """Return the retriever's weight and the temperature for serving language model and retriever together.

    With an uninformative language model the weight is 1, which keeps the retriever's order. The temperature changes no
    ranking; it calibrates the served probabilities (Guo et al. 2017).

    Args:
        model: the language model's log-probabilities [k] for each validation user.
        scores: the retriever's logits [k] for each user.
        truths: position (from 0) of the true item among the candidates of each user.
    """
    sources = [
        np.stack([log_softmax(row), log_softmax(prior)], axis=-1) for row, prior in zip(model, scores, strict=True)
    ]
    language_model, retriever = fit_pool(sources, truths)
    total = language_model + retriever
    if not total:
        return 1.0, TEMPERATURES[1]
    return round(float(retriever / total), 3), round(float(np.clip(1 / total, *TEMPERATURES)), 3)
