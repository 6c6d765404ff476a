"""Language model and retriever in one distribution over the candidates, and the order read from it.

The paper ranks by the language model alone (section 3.2.2): weight 0. A small or briefly tuned language model alone can
lower the list, so the ranker may weigh in what the retriever thought of the same candidates.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from models.metrics import ndcg

Floats = NDArray[np.float64]
WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
"""Of the retriever, for curves: 0 is the language model alone, 1 the retriever alone."""


def log_softmax(scores: ArrayLike) -> Floats:
    """Log-probabilities of scores [..., k]."""
    values = np.asarray(scores, dtype=np.float64)
    shifted = values - values.max(axis=-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def fuse(model_logprobs: ArrayLike, retriever_scores: ArrayLike, weight: float) -> Floats:
    """Log-probabilities of k candidates: those of language model and retriever averaged, ``1 - weight`` to ``weight``.

    Both are normalised over the k first, and so is the result (a logarithmic opinion pool; Genest and Zidek 1986).
    A candidate that the retriever does not know (score -inf) gets the mean log-probability of those it knows, so that
    the language model alone speaks for or against it.

    Args:
        model_logprobs: the language model's logits or log-probabilities [..., k].
        retriever_scores: the retriever's logits [..., k].
        weight: of the retriever, 0 (language model only) to 1.
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


def order(logprobs: ArrayLike, retriever_ranks: ArrayLike) -> NDArray[np.int64]:
    """Places of the candidates [k], most probable first; ties go to the better retriever rank, unknown (0) last."""
    ranks = np.asarray(retriever_ranks, dtype=np.int64)
    unknown_last = np.where(ranks == 0, np.iinfo(np.int64).max, ranks)
    places: NDArray[np.int64] = np.lexsort((unknown_last, -np.asarray(logprobs, dtype=np.float64)))
    return places


def fused_ranks(
    model: Sequence[ArrayLike], scores: Sequence[ArrayLike], truths: Sequence[int], weight: float
) -> NDArray[np.int64]:
    """Place (from 1) of each user's true item in the fused list.

    Args:
        model: the language model's log-probabilities [k] for each user, candidates in retriever order.
        scores: retriever logits [k] of each user.
        truths: place (from 0) of the true item among the candidates of each user.
        weight: of the retriever.
    """
    places = np.empty(len(truths), dtype=np.int64)
    lengths = np.array([len(np.asarray(row)) for row in model])
    for k in np.unique(lengths):
        users = np.flatnonzero(lengths == k)
        fused = fuse(np.stack([model[u] for u in users]), np.stack([scores[u] for u in users]), weight)  # [users, k]
        places[users] = true_places(fused, [truths[u] for u in users])
    return places


def true_places(scores: Floats, truths: Sequence[int]) -> NDArray[np.int64]:
    """Place (from 1) of each user's true item by scores [users, k]; equals keep the candidates' order."""
    truth = np.asarray(truths)[:, None]  # [users, 1]
    its_own = np.take_along_axis(scores, truth, axis=1)
    before = (scores > its_own) | ((scores == its_own) & (np.arange(scores.shape[1]) < truth))
    places: NDArray[np.int64] = before.sum(axis=1) + 1
    return places


def ndcg_by_weight(
    model: Sequence[ArrayLike], scores: Sequence[ArrayLike], truths: Sequence[int]
) -> dict[float, float]:
    """NDCG@10 at each of :data:`WEIGHTS`.

    Args: see :func:`fused_ranks`.
    """
    return {weight: ndcg(fused_ranks(model, scores, truths, weight), 10) for weight in WEIGHTS}
