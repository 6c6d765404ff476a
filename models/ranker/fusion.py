"""Fuses the scores of language model and retriever into one distribution over the candidates.

The paper ranks by the language model alone (section 3.2.2), which is weight 0. A small or briefly tuned language model
alone can rank worse than the retriever, so the ranker may include the retriever's scores of the same candidates.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from models.metrics import ndcg

Floats = NDArray[np.float64]
WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
"""The retriever's weights at which curves are computed: 0 is the language model alone, 1 the retriever alone."""


def log_softmax(scores: ArrayLike) -> Floats:
    """Return the log-probabilities [..., k] of scores [..., k]."""
    values = np.asarray(scores, dtype=np.float64)
    shifted = values - values.max(axis=-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def fuse(model_logprobs: ArrayLike, retriever_scores: ArrayLike, weight: float) -> Floats:
    """Return the log-probabilities [..., k] of the candidates by language model and retriever together.

    The log-probabilities of both are averaged with the weights ``1 - weight`` and ``weight``. Both are normalised over
    the k candidates first, and so is the result (a logarithmic opinion pool; Genest and Zidek 1986). For a candidate
    outside the retriever's vocabulary (score -inf), the retriever's part is the mean log-probability of the known
    candidates, so that only the language model moves it up or down.

    Args:
        model_logprobs: the language model's logits or log-probabilities [..., k].
        retriever_scores: the retrieval stage's scores [..., k], logits or log-probabilities.
        weight: weight of the retriever, from 0 (language model only) to 1 (retriever only).
    """
    model = log_softmax(model_logprobs)
    if weight == 0.0:
        return model
    scores = np.asarray(retriever_scores, dtype=np.float64)
    known = np.isfinite(scores)
    any_known = known.any(axis=-1, keepdims=True)
    prior = log_softmax(np.where(any_known, scores, 0.0))
    mean = np.where(known, prior, 0.0).sum(axis=-1, keepdims=True) / np.maximum(known.sum(axis=-1, keepdims=True), 1)
    fused = log_softmax((1 - weight) * model + weight * np.where(known, prior, mean))
    return np.where(any_known, fused, model)


def boosted(logprobs: Floats, boosts: NDArray[np.float32] | None, temperature: float = 1.0) -> Floats:
    """Return log-probabilities [k] such that a boost multiplies the odds of a candidate in the answer by its factor.

    Args:
        logprobs: fused log-probabilities, which the answer divides by the temperature.
        boosts: logarithms of the factors [k]; None or empty if there are none, and nothing changes.
        temperature: temperature of the answer's probabilities.
    """
    return logprobs if boosts is None or not len(boosts) else logprobs + temperature * boosts.astype(np.float64)


def order(logprobs: ArrayLike, retriever_ranks: ArrayLike) -> NDArray[np.int64]:
    """Return the candidates' positions [k], most probable first; ties go to the better retriever rank, rank 0 last."""
    ranks = np.asarray(retriever_ranks, dtype=np.int64)
    unknown_last = np.where(ranks == 0, np.iinfo(np.int64).max, ranks)
    places: NDArray[np.int64] = np.lexsort((unknown_last, -np.asarray(logprobs, dtype=np.float64)))
    return places


def fused_ranks(
    model: Sequence[ArrayLike], scores: Sequence[ArrayLike], truths: Sequence[int], weight: float
) -> NDArray[np.int64]:
    """Return the rank (from 1) of each user's true item in the fused list.

    Args:
        model: the language model's log-probabilities [k] for each user, candidates in the retriever's order.
        scores: the retrieval stage's scores [k] for each user, logits or log-probabilities.
        truths: position (from 0) of the true item among the candidates of each user.
        weight: weight of the retriever.
    """
    places = np.empty(len(truths), dtype=np.int64)
    lengths = np.array([len(np.asarray(row)) for row in model])
    for k in np.unique(lengths):
        users = np.flatnonzero(lengths == k)
        fused = fuse(np.stack([model[u] for u in users]), np.stack([scores[u] for u in users]), weight)  # [users, k]
        places[users] = true_places(fused, [truths[u] for u in users])
    return places


def true_places(scores: Floats, truths: Sequence[int]) -> NDArray[np.int64]:
    """Return the rank (from 1) of each user's true item by scores [users, k]; ties keep the candidates' order."""
    truth = np.asarray(truths)[:, None]  # [users, 1]
    its_own = np.take_along_axis(scores, truth, axis=1)
    before = (scores > its_own) | ((scores == its_own) & (np.arange(scores.shape[1]) < truth))
    places: NDArray[np.int64] = before.sum(axis=1) + 1
    return places


def ndcg_by_weight(
    model: Sequence[ArrayLike], scores: Sequence[ArrayLike], truths: Sequence[int]
) -> dict[float, float]:
    """Return the NDCG@10 of the fused list at each of :data:`WEIGHTS`; see :func:`fused_ranks` for the arguments."""
    return {weight: ndcg(fused_ranks(model, scores, truths, weight), 10) for weight in WEIGHTS}
