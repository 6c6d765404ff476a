"""Items nearest to an item, by what the signals know of both: transitions and the words of their titles.

To a history of one item, the retrieval stage's signals are its transitions to a candidate, and three times the likeness
of the titles (the mean, the maximum and the last of one). So the stage's own weights also combine the two for a pair of
items. The search does not read co-occurrence.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.sparse import SparseRows

EQUAL = 1.0
"""Weight of each signal if the retrieval stage uses neither."""
LIKENESS = ("likeness_mean", "likeness_max", "likeness_last")
"""Signals that are the likeness of two titles, if the history is one item."""


class Weights(NamedTuple):
    """Weights of the two signals."""

    transitions: float
    titles: float

    @classmethod
    def of(cls, stage: Mapping[str, float]) -> "Weights":
        """Return those of the retrieval stage's weights; 1 for both if the stage uses neither signal."""
        found = cls(stage.get("transitions", 0.0), sum(stage.get(name, 0.0) for name in LIKENESS))
        return found if any(found) else cls(EQUAL, EQUAL)


class Neighbours(NamedTuple):
    """Items like another, nearest first."""

    items: NDArray[np.int32]
    """Item numbers [k]."""
    scores: NDArray[np.float64]
    """Weighted sums of both signals [k]."""
    transitions: NDArray[np.float64]
    """log(1 + the number of transitions to the item) [k]."""
    titles: NDArray[np.float32]
    """Cosine similarities of the titles [k]."""


@dataclass(frozen=True)
class TitleIndex:
    """Titles of items by number, and the items of each word, so that a look-up reads only titles that share a word."""

    rows: SparseRows
    """TF-IDF weights of each title [titles, words]."""
    postings: SparseRows
    """The same by word [words, titles]."""
    first: int
    """Number of the item with the first title."""

    @classmethod
    def of(cls, rows: SparseRows, first: int = 0) -> "TitleIndex":
        """Return the index of titles; see the fields."""
        titles = np.repeat(np.arange(len(rows.offsets) - 1, dtype=np.int32), np.diff(rows.offsets))
        order = np.argsort(rows.columns, kind="stable")
        offsets = np.concatenate(([0], np.cumsum(np.bincount(rows.columns)))).astype(np.int64)
        return cls(rows, SparseRows(offsets, titles[order], rows.values[order]), first)

    def like(
        self, words: NDArray[np.int32], weights: NDArray[np.float32]
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the items with a word of a title, in ascending order, and the cosine similarities of their titles.

        The sums are those of :class:`models.signals.likeness.TitleLikeness`, word by word.

        Args:
            words: the title's words [w], in ascending order.
            weights: their TF-IDF weights [w].
        """
        word, places, values = self.postings.entries(words)
        found, item = np.unique(places, return_inverse=True)
        similarities = np.bincount(item, values * weights[word], minlength=len(found))
        return (found + self.first).astype(np.int32), similarities.astype(np.float32)


@dataclass(frozen=True)
class NeighbourSearch:
    """Finds the items nearest to an item."""

    transitions: SparseRows | None
    """Number of transitions by the earlier and the later item; None if they were not counted."""
    titles: TitleIndex | None
    """None if the words of titles are not known."""
    weights: Weights
    added: TitleIndex | None = None
    """Titles of items that were added later."""

    def with_added(self, titles: SparseRows, first: int) -> "NeighbourSearch":
        """Return a search that finds further items by their titles.

        Args:
            titles: TF-IDF weights of their titles; the row of a number that stands for nothing is empty.
            first: number of the first of them.
        """
        return replace(self, added=TitleIndex.of(titles, first))

    def __call__(self, item: int, k: int, hidden: Collection[int] = ()) -> Neighbours:
        """Return the ``k`` nearest items, or fewer: each has a transition from the item, or shares a word of the title.

        Items of equal scores are ordered by their titles, then by transitions, then by number.

        Args:
            item: the item's number.
            k: maximum number of items.
            hidden: item numbers that must not be returned.
        """
        followers, counts = self._followers(item)
        alike, similarities = self._alike(item)
        found = np.setdiff1d(np.union1d(followers, alike), [item, *hidden]).astype(np.int32)
        transitions, titles = np.zeros(len(found)), np.zeros(len(found), np.float32)
        for items, values, signal in ((followers, np.log1p(counts), transitions), (alike, similarities, titles)):
            _, theirs, ours = np.intersect1d(items, found, assume_unique=True, return_indices=True)
            signal[ours] = values[theirs]
        scores = self.weights.transitions * transitions + self.weights.titles * titles.astype(np.float64)
        order = np.lexsort((found, -transitions, -titles, -scores))[:k]
        return Neighbours(found[order], scores[order], transitions[order], titles[order])

    def _followers(self, item: int) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """Return the items that followed an item, in ascending order, and how often they did."""
        if self.transitions is None:
            return np.empty(0, np.int32), np.empty(0)
        _, items, counts = self.transitions.entries(np.array([item], np.int32))
        return items, counts.astype(np.float64)

    def _alike(self, item: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the items whose titles share a word with that of an item, in ascending order, and their likeness."""
        indexes = [index for index in (self.titles, self.added) if index is not None]
        if not indexes:
            return np.empty(0, np.int32), np.empty(0, np.float32)
        own = indexes[-1] if item >= indexes[-1].first else indexes[0]
        _, words, weights = own.rows.entries(np.array([item - own.first], np.int32))
        items, similarities = zip(*(index.like(words, weights) for index in indexes), strict=True)
        return np.concatenate(items), np.concatenate(similarities)
