"""Fits the weight of each source of scores in the final ranking, on validation users.

Sources are pooled by weighted sums of log-probabilities (:func:`models.ranker.fusion.fuse`). The fitted weights make
the users' true items most probable (a conditional logit; McFadden 1974) instead of maximising NDCG@10: a small change
of a probability can move a rank by several places, so with some hundred users the weight with the best NDCG is largely
a matter of chance (``experiments/fusion_weights.py`` measures both).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from models.conditional_logit import fit_pool
from models.intervals import bootstrap
from models.metrics import gains
from models.ranker.fusion import fused_ranks, log_softmax

TEMPERATURES = (0.25, 4.0)
"""Lowest and highest temperature."""
FOLDS = 5
"""Number of parts of the validation users for :func:`expected_gain`."""


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


class Gain(NamedTuple):
    """What the language model adds to the NDCG@10 of the retrieval stage, for users whose true item is a candidate."""

    mean: float
    low: float
    """Lower end of the 95 % bootstrap interval over the users."""
    high: float


def expected_gain(model: Sequence[ArrayLike], scores: Sequence[ArrayLike], truths: Sequence[int]) -> Gain | None:
    """Return what the fused list gains over the retriever's, for users that did not take part in the fit.

    The weight that ranks a fifth of the users is fitted on the others, so that the gain is not that of a weight fitted
    to the same users. It is None for a single user.

    Args:
        model: the language model's log-probabilities [k] for each validation user.
        scores: the retrieval stage's scores [k] for each user, logits or log-probabilities, best first.
        truths: position (from 0) of the true item among the candidates of each user.
    """
    count = len(truths)
    if count < 2:
        return None
    ranks = np.empty(count, np.int64)
    fold = np.arange(count) % min(FOLDS, count)  # validation users come in random order

    def part(users: Iterable[int]) -> tuple[list[ArrayLike], list[ArrayLike], list[int]]:
        chosen = list(users)
        return [model[user] for user in chosen], [scores[user] for user in chosen], [truths[user] for user in chosen]

    for left_out in np.unique(fold):
        weight, _ = fit_fusion(*part(np.flatnonzero(fold != left_out)))
        held = np.flatnonzero(fold == left_out)
        ranks[held] = fused_ranks(*part(held), weight)
    return Gain(*bootstrap(gains(ranks, 10) - gains(np.asarray(truths) + 1, 10)))


def fit_served(
    model: Sequence[ArrayLike], scores: Sequence[ArrayLike], truths: Sequence[int], gain: Gain | None
) -> tuple[float, float]:
    """Return the weight and temperature that are served: those of :func:`fit_fusion`, or the retriever alone.

    The retriever alone is served where the fused list is expected to be worse beyond the interval: likelihood and
    NDCG@10 may disagree. See :func:`expected_gain` for the arguments.
    """
    if gain is not None and gain.high < 0:
        return fit_fusion([np.zeros_like(row) for row in model], scores, truths)
    return fit_fusion(model, scores, truths)
