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
        if not len(others):
            return np.zeros((len(items), 0), np.float32)
        rows, columns, values = self.rows.entries(others)
        words = np.unique(columns)
        theirs = np.zeros((len(words), len(others)), np.float32)
        theirs[np.searchsorted(words, columns), rows] = values
        rows, columns, values = self.rows.entries(items)
        places = np.searchsorted(words, columns)
        shared = np.flatnonzero(np.append(words, -1)[places] == columns)
        products = values[shared, np.newaxis] * theirs[places[shared]]  # [entries, b]
        cells = rows[shared, np.newaxis] * len(others) + np.arange(len(others))
        # Sums word by word: the rounding of a matrix product would depend on which other items are asked for.
        sums = np.bincount(cells.ravel(), products.ravel(), minlength=len(items) * len(others))
        return sums.reshape(len(items), len(others)).astype(np.float32)
