"""The retrieval stage: selects candidates from the scores of one or two retrievers, and reorders them by signals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.retriever.candidates import (
    Candidates,
    best_first,
    given_candidates,
    in_vocabulary,
    mask,
    place_of,
    top_candidates,
)
from models.signals.signals import Signals

Row = NDArray[np.float32]
"""A retriever's logits of every item [items + 1], the padding's first."""


@dataclass(frozen=True)
class RetrievalStage:
    """Selects candidates for one user.

    Without signals they are the retriever's best items. With signals they are chosen from the pool of each retriever's
    best items by the weighted sum of scores and signals (:class:`models.signals.signals.Signals`). The scores of the
    candidates that are handed on are their log-probabilities.
    """

    signals: Signals | None = None

    def ordered(self, rows: Sequence[Row], history: NDArray[np.int32], masked: NDArray[np.int32], k: int) -> Candidates:
        """Return the whole pool with signals, or else the best ``k`` items, in the stage's order.

        Args:
            rows: the scores of each retriever; masked items are set to -inf in place.
            history: item numbers, oldest first.
            masked: item numbers that must not be returned.
            k: number of items without signals.
        """
        if self.signals is None:
            return top_candidates(rows[0], masked, k)
        return self.reorder(history, *pool_of(rows, masked, max(self.signals.pool, k)))

    def reorder(self, history: NDArray[np.int32], items: NDArray[np.int32], logits: NDArray[np.float32]) -> Candidates:
        """Return items in the order of their weighted sums of scores and signals, which become their scores.

        Args:
            history: item numbers, oldest first.
            items: distinct item numbers [k] in ascending order.
            logits: the retrievers' logits of the items [k, retrievers].
        """
        assert self.signals is not None
        scores = self.signals.scores(history, items, logits).astype(np.float32)
        order = best_first(scores)
        return Candidates(items[order], scores[order], np.arange(1, len(order) + 1, dtype=np.int32))

    def candidates(
        self, rows: Sequence[Row], history: NDArray[np.int32], masked: NDArray[np.int32], k: int
    ) -> Candidates:
        """Return the best ``k`` items with their log-probabilities; see :meth:`ordered` for the arguments."""
        return self.ordered(rows, history, masked, k).first(k)

    def given(self, rows: Sequence[Row], history: NDArray[np.int32], items: NDArray[np.int32]) -> Candidates:
        """Return the caller's items in the stage's order; items outside the vocabulary come last, with rank 0.

        Args:
            rows: the scores of each retriever.
            history: item numbers, oldest first.
            items: distinct item numbers [k]; see :class:`models.retriever.candidates.Candidates`.
        """
        if self.signals is None:
            return given_candidates(rows[0], items).first(len(items))
        known = np.sort(items[in_vocabulary(items, len(rows[0]))])
        scored = np.full(len(rows[0]), -np.inf, np.float32)
        found = self.reorder(history, known, logits_of(rows, known))
        scored[found.items] = found.scores
        return given_candidates(scored, items).first(len(items))


def pool_of(rows: Sequence[Row], masked: NDArray[np.int32], size: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return the best items of every retriever, in ascending order, and their logits [k, retrievers].

    Args:
        rows: the scores of each retriever; masked items are set to -inf in place.
        masked: item numbers that must not be in the pool.
        size: number of items of each retriever.
    """
    items = np.unique(np.concatenate([top_candidates(row, masked, size).items for row in rows]))
    return items, logits_of(rows, items)


def logits_of(rows: Sequence[Row], items: NDArray[np.int32]) -> NDArray[np.float32]:
    """Return the retrievers' logits of items [k, retrievers]."""
    return np.stack([row[items] for row in rows], axis=1)


def rank_in(ordered: Candidates, row: Row, item: int) -> int:
    """Return the rank (from 1) of an item in the stage's order of all items; 0 if the item is masked or unknown.

    Items outside the pool follow it in the order of the first retriever.

    Args:
        ordered: the result of :meth:`RetrievalStage.ordered`.
        row: the first retriever's scores, masked.
        item: the item's number.
    """
    if item >= len(row) or not np.isfinite(row[item]):
        return 0
    found = np.flatnonzero(ordered.items == item)
    if len(found):
        return int(found[0]) + 1
    outside = row.copy()
    mask(outside, ordered.items)
    return len(ordered.items) + place_of(outside, item)
