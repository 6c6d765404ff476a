"""Transitions: how often an item followed another one in the training sequences.

A graph of items that needs no training, in the spirit of arXiv 2605.07125: what followed the items of a user's recent
history for other users is likely to follow for this user too.
"""

import numpy as np
from numpy.typing import NDArray

from models.sparse import SparseRows


class Transitions:
    """Weighted counts of transitions between items.

    Args:
        counts: the count of every pair, by number of the earlier item and of the later one.
    """

    def __init__(self, counts: SparseRows) -> None:
        self.counts = counts
        self._followers = int(counts.columns.max(initial=0)) + 1
        """Number from which on no item followed another one."""

    def __call__(self, items: NDArray[np.int32], recent: NDArray[np.int32]) -> NDArray[np.float64]:
        """Return log(1 + the number of transitions) from a recent history to each of some items [k].

        Args:
            items: item numbers [k], distinct.
            recent: item numbers of the recent history, latest first; transitions from the n-th count 1 / n.
        """
        if not len(items):
            return np.zeros(0)
        place, followers, counts = self.counts.entries(recent)
        column = np.full(max(self._followers, int(items.max()) + 1), len(items))  # the last is for all other items
        column[items] = np.arange(len(items))
        weights = counts / (1 + place)
        total: NDArray[np.float64] = np.log1p(np.bincount(column[followers], weights, minlength=len(items) + 1)[:-1])
        return total
