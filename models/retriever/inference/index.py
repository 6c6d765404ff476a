"""Optional approximate nearest-neighbour search over the items, with faiss's inverted lists of full vectors."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.retriever.candidates import Candidates, best_first
from preprocessing.errors import InputError

PROBED = 32
"""Maximum number of inverted lists that a search reads; an index of n items has sqrt(n) lists."""


def import_faiss() -> Any:
    """Return the faiss module.

    Raises:
        InputError: faiss is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise InputError(
            "an approximate index needs faiss, which is not installed: `pip install 'llamarec[faiss]'`,"
            " or export without --index"
        ) from None
    return faiss


def build_index(embeddings: NDArray[np.float32], bias: NDArray[np.float32], path: Path) -> None:
    """Write an index that searches for the largest inner product plus bias; the bias is stored as one more dimension.

    Args:
        embeddings: item embeddings [items + 1, width]; the first is the padding's and is left out.
        bias: item biases [items + 1].
        path: the index file.

    Raises:
        InputError: faiss is not installed.
    """
    faiss = import_faiss()
    vectors = np.concatenate((embeddings[1:], bias[1:, np.newaxis]), axis=1)
    lists = math.isqrt(len(vectors))
    width = vectors.shape[1]
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
    # Train on at most 64 points per list; a minimum of 1 suppresses faiss's warning about small catalogues.
    index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, 64
    index.train(vectors)
    index.add(vectors)
    index.nprobe = min(PROBED, lists)
    faiss.write_index(index, str(path))


class ApproximateIndex:
    """An index that :func:`build_index` wrote.

    Args:
        path: the index file.
        threads: number of threads of a search, set for the whole process.

    Raises:
        InputError: faiss is not installed.
    """

    def __init__(self, path: Path, threads: int) -> None:
        self._faiss = import_faiss()
        self._faiss.omp_set_num_threads(threads)
        self._index = self._faiss.read_index(str(path))

    def search(self, state: NDArray[np.float32], masked: NDArray[np.int32], k: int) -> Candidates:
        """Return the best ``k`` items in the lists nearest to a state, or fewer if those lists hold fewer.

        Args:
            state: the history's state [width].
            masked: item numbers, from 1, that must not be returned.
            k: number of items.
        """
        faiss = self._faiss
        allowed = faiss.IDSelectorNot(faiss.IDSelectorBatch(np.unique(masked).astype(np.int64) - 1))
        parameters = faiss.SearchParametersIVF(sel=allowed, nprobe=self._index.nprobe)
        query = np.append(state, np.float32(1))[np.newaxis]
        (scores,), (found,) = self._index.search(query, k, params=parameters)
        by_number = np.argsort(found[found >= 0])
        items, scores = (found[found >= 0] + 1)[by_number], scores[found >= 0][by_number]
        order = best_first(scores)
        return Candidates(items[order].astype(np.int32), scores[order], np.arange(1, len(order) + 1, dtype=np.int32))
