"""Ranking metrics for one true item per user (paper, section 4.0.2).

Ranks count from 1; 0 means that the true item was not ranked. With one relevant item per user, Recall@k is the share of
users whose rank is at most k, MRR@k the mean reciprocal rank and NDCG@k the mean of 1 / log2(rank + 1), where ranks
beyond k contribute 0.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

CUTOFFS = (5, 10)


def _hits(ranks: ArrayLike, k: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    places = np.asarray(ranks, dtype=np.float64)
    if places.size == 0:
        raise ValueError("a metric needs at least one user")
    return places, (places >= 1) & (places <= k)


def recall(ranks: ArrayLike, k: int) -> float:
    """Return the share of users whose true item is among the first ``k``."""
    return float(_hits(ranks, k)[1].mean())


def mrr(ranks: ArrayLike, k: int) -> float:
    """Return the mean reciprocal rank; ranks beyond ``k`` count as 0."""
    places, hit = _hits(ranks, k)
    return float(np.divide(1.0, places, out=np.zeros_like(places), where=hit).mean())


def gains(ranks: ArrayLike, k: int) -> NDArray[np.float64]:
    """Return each user's normalised discounted cumulative gain; the ideal gain is 1 (Jarvelin and Kekalainen 2002)."""
    places, hit = _hits(ranks, k)
    return np.where(hit, 1.0 / np.log2(np.maximum(places, 1.0) + 1.0), 0.0)


def ndcg(ranks: ArrayLike, k: int) -> float:
    """Return the mean of the users' :func:`gains`."""
    return float(gains(ranks, k).mean())


def summary(ranks: ArrayLike) -> dict[str, float]:
    """Return MRR, NDCG and Recall at 5 and 10, under the names of the paper's tables."""
    measures = {"MRR": mrr, "NDCG": ndcg, "Recall": recall}
    return {f"{name}@{k}": measure(ranks, k) for k in CUTOFFS for name, measure in measures.items()}
