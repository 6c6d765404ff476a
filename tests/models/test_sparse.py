"""Rows of a sparse matrix in plain arrays, compared with SciPy's."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array

from models.sparse import SparseRows

matrices = st.builds(
    lambda seed, rows, columns, share: np.where(
        np.random.default_rng(seed).random((rows, columns)) < share,
        np.random.default_rng(seed).integers(1, 9, (rows, columns)),
        0,
    ).astype(np.float32),
    st.integers(0, 1 << 30),
    st.integers(0, 7),
    st.integers(1, 6),
    st.floats(0, 1),
)


def sparse(matrix: np.ndarray) -> SparseRows:
    """Return a matrix as SciPy compresses it."""
    rows = csr_array(matrix)
    return SparseRows(rows.indptr.astype(np.int64), rows.indices.astype(np.int32), rows.data.astype(np.float32))


def test_entries_by_hand():
    """Rows 2, 0 and 2 of three: two entries, none, and the same two again, each with its place in the question."""
    rows = sparse(np.array([[0, 0, 0], [5, 0, 0], [0, 7, 8]]))
    places, columns, values = rows.entries(np.array([2, 0, 2], np.int32))
    assert (places.tolist(), columns.tolist(), values.tolist()) == ([0, 0, 2, 2], [1, 2, 1, 2], [7, 8, 7, 8])


def test_rows_beyond_the_end_are_empty():
    """By hand: of three rows, row 3 and any later one have no entries, and the question may hold nothing at all."""
    rows = sparse(np.array([[1, 0], [0, 2], [3, 4]]))
    places, columns, values = rows.entries(np.array([3, 1, 400, 2], np.int32))
    assert (places.tolist(), columns.tolist(), values.tolist()) == ([1, 3, 3], [1, 0, 1], [2, 3, 4])
    assert [len(part) for part in rows.entries(np.empty(0, np.int32))] == [0, 0, 0]


@given(matrices, st.lists(st.integers(0, 9), max_size=12))
def test_entries_equal_the_dense_matrix(matrix, asked):
    """The reference looks every row up in the dense matrix; rows beyond its end are zeros."""
    padded = np.concatenate((matrix, np.zeros((10, matrix.shape[1]), np.float32)))[asked]
    expected_places, expected_columns = np.nonzero(padded)
    places, columns, values = sparse(matrix).entries(np.array(asked, np.int32))
    assert places.tolist() == expected_places.tolist()
    assert columns.tolist() == expected_columns.tolist()
    assert values.tolist() == padded[expected_places, expected_columns].tolist()
