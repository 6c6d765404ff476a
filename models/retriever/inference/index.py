"""An approximate search of the items, used only when it is asked for: faiss's inverted lists of full vectors."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.retriever.candidates import Candidates, best_first
from preprocessing.errors import InputError

PROBED = 32
"""Lists that a search reads, of the square root of the number of items."""


def import_faiss() -> Any:
    """The library.

    Raises:
        InputError: it is not installed.
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
    """Writes an index for the largest inner products plus bias, the bias being one dimension more.

    Args:
        embeddings: [items + 1, width], the padding's first, which is left out.
        bias: [items + 1].
        path: the file.

    Raises:
        InputError: faiss is not installed.
    """
    faiss = import_faiss()
    vectors = np.concatenate((embeddings[1:], bias[1:, np.newaxis]), axis=1)
    lists = math.isqrt(len(vectors))
    width = vectors.shape[1]
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, 64  # its own choice of points, quietly
    index.train(vectors)
    index.add(vectors)
    index.nprobe = min(PROBED, lists)
    faiss.write_index(index, str(path))


class ApproximateIndex:
    """Searches what :func:`build_index` wrote."""

    def __init__(self, path: Path, threads: int) -> None:
        """Raises:
        InputError: faiss is not installed.
        """
        self._faiss = import_faiss()
        self._faiss.omp_set_num_threads(threads)
        self._index = self._faiss.read_index(str(path))

    def search(self, state: NDArray[np.float32], masked: NDArray[np.int32], k: int) -> Candidates:
        """The best ``k`` items of the lists nearest to a state [width], fewer where those lists hold fewer.

        Args:
            state: what the scores are computed from.
            masked: item numbers from 1 that must not be returned.
            k: how many.
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
