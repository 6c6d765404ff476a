"""A sparse matrix by rows in plain NumPy arrays, which can be stored without pickle and needs no SciPy to be read."""

from collections.abc import Sequence
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

    @classmethod
    def empty(cls) -> "SparseRows":
        """Return a matrix without rows."""
        return cls(np.zeros(1, np.int64), np.empty(0, np.int32), np.empty(0, np.float32))

    @classmethod
    def of(cls, parts: Sequence["SparseRows"]) -> "SparseRows":
        """Return the rows of one or more matrices, one below the other."""
        lengths = np.concatenate([np.diff(part.offsets) for part in parts])
        return cls(
            np.concatenate(([0], np.cumsum(lengths))),
            np.concatenate([part.columns for part in parts]),
            np.concatenate([part.values for part in parts]),
        )

    def row(self, place: int) -> "SparseRows":
        """Return one row as a matrix."""
        start, end = self.offsets[place], self.offsets[place + 1]
        return SparseRows(np.array([0, end - start]), self.columns[start:end], self.values[start:end])

    def entries(self, rows: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]:
        """Return place in ``rows``, column and value of every entry in these rows.

        Rows beyond the end of the matrix are empty.
        """
        last = len(self.offsets) - 1
        starts = self.offsets[np.minimum(rows, last)]
        lengths = self.offsets[np.minimum(rows + 1, last)] - starts
        ends = lengths.cumsum()
        place = np.repeat(starts - ends + lengths, lengths)
        place += np.arange(len(place))
        return np.repeat(np.arange(len(rows)), lengths), self.columns[place], self.values[place]
