"""Title likeness: how similar the titles of candidates are to the titles of the recent history."""

import numpy as np
from numpy.typing import NDArray

from models.sparse import SparseRows


class TitleLikeness:
    """Cosine similarity of titles by TF-IDF: 1 for the same words, 0 for no word in common; rare words weigh more.

    Args:
        rows: TF-IDF weights of the title of every item by number, an empty row for the padding first; each row has
            length 1, or 0 if it is empty.
    """

    def __init__(self, rows: SparseRows) -> None:
        self.rows = rows

    def __call__(self, items: NDArray[np.int32], others: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return the similarity [a, b] of each of ``items`` [a] to each of ``others`` [b]."""
        rows, columns, values = self.rows.entries(others)
        words = np.unique(columns)
        theirs = np.zeros((len(others), len(words)), np.float32)
        theirs[rows, np.searchsorted(words, columns)] = values
        rows, columns, values = self.rows.entries(items)
        shared = np.isin(columns, words)
        rows, values, places = rows[shared], values[shared], np.searchsorted(words, columns[shared])
        similarities = np.zeros((len(items), len(others)), np.float32)
        # Sums word by word: the rounding of a matrix product would depend on which other items are asked for.
        for column, other in enumerate(theirs):
            similarities[:, column] = np.bincount(rows, values * other[places], minlength=len(items))
        return similarities
