"""A sparse matrix by rows in plain NumPy arrays, which can be stored without pickle and needs no SciPy to be read."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class SparseRows(NamedTuple):
    """A sparse matrix by rows; row ``r`` holds ``values[offsets[r]:offsets[r + 1]]`` in the columns of that slice."""

    offsets: NDArray[np.int64]
    """Where each row starts, and the last one ends [rows + 1]."""
    columns: NDArray[np.int32]
    """Ascending within each row."""
    values: NDArray[np.float32]

    def followed_by(self, other: "SparseRows") -> "SparseRows":
        """Return these rows and those of another matrix below them."""
        return SparseRows(
            np.concatenate((self.offsets, self.offsets[-1] + other.offsets[1:])),
            np.concatenate((self.columns, other.columns)),
            np.concatenate((self.values, other.values)),
        )

    def entries(self, rows: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]:
        """Return place in ``rows``, column and value of every entry in these rows.

        Rows beyond the end of the matrix are empty.
        """
        last = len(self.offsets) - 1
        starts, ends = (self.offsets[np.minimum(row, last)] for row in (rows, rows + 1))
        lengths = ends - starts
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        place = np.repeat(starts, lengths) + within
        return np.repeat(np.arange(len(rows)), lengths), self.columns[place], self.values[place]
