"""Fits the weight of each source of scores in the final ranking, on validation users.

Sources are pooled by weighted sums of log-probabilities (:func:`models.ranker.fusion.fuse`). The fitted weights make
the users' true items most probable (a conditional logit; McFadden 1974) instead of maximising NDCG@10: a small change
of a probability can move a rank by several places, so with some hundred users the weight with the best NDCG is largely
a matter of chance (``experiments/fusion_weights.py`` measures both).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from models.conditional_logit import fit_pool
from models.ranker.fusion import log_softmax

TEMPERATURES = (0.25, 4.0)
"""Lowest and highest temperature."""


def fit_fusion(model: Sequence[ArrayLike], scores: Sequence[ArrayLike], truths: Sequence[int]) -> tuple[float, float]:
    """Return the retriever's weight and the temperature for serving language model and retriever together.

    With an uninformative language model the weight is 1, which keeps the retriever's order. The temperature changes no
    ranking; it calibrates the served probabilities (Guo et al. 2017).

    Args:
        model: the language model's log-probabilities [k] for each validation user.
        scores: the retrieval stage's scores [k] for each user, logits or log-probabilities.
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
