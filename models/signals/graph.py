"""Graphs of items that were counted in the training sequences and need no training, in the spirit of arXiv 2605.07125.

What followed the items of a user's recent history for other users, or often came near them, is likely to come next for
this user too.
"""

import numpy as np
from numpy.typing import NDArray

from models.sparse import SparseRows


class ItemGraph:
    """Weighted edges from items to items.

    Args:
        edges: the weight of each edge, by number of the item that it starts from and of the one that it leads to.
    """

    def __init__(self, edges: SparseRows) -> None:
        self.edges = edges
        self._reached = int(edges.columns.max(initial=0)) + 1
        """Number from which on no edge leads to an item."""

    def __call__(self, items: NDArray[np.int32], recent: NDArray[np.int32]) -> NDArray[np.float64]:
        """Return the sum of the edges from a recent history to each of some items [k].

        Args:
            items: item numbers [k], distinct.
            recent: item numbers of the recent history, latest first; edges from the n-th count 1 / n.
        """
        if not len(items):
            return np.zeros(0)
        place, reached, edges = self.edges.entries(recent)
        column = np.full(max(self._reached, int(items.max()) + 1), len(items))  # the last is for all other items
        column[items] = np.arange(len(items))
        sums = np.bincount(column[reached], edges / (1 + place), minlength=len(items) + 1)[:-1]
        return sums.astype(np.float64)  # without edges they are integers
