"""Counts the statistics that the signals read, and fits the signals' weights on validation users."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from models.conditional_logit import fit_pool
from models.signals.graph import ItemGraph
from models.signals.likeness import TitleLikeness
from models.signals.signals import RETRIEVERS, SIGNALS, ItemStatistics
from models.sparse import SparseRows
from models.titles.fit_words import fit_words
from models.titles.words import WordEncoder

REACH = 3
"""Maximum distance of two items of a sequence that count as a transition; at distance d it counts 1 / d."""
NEAR = 30
"""Maximum distance of two items of a sequence that count as a co-occurrence, in either order."""
DISCOUNT = 0.75
"""Exponent of the two items' occurrences by which their co-occurrences are divided: 0.5 would be the cosine, 1 the lift
but for a factor. Of 0.5, 0.75 and 1 it is the best on the validation users of MovieLens."""
MOST_EDGES = 500
"""Maximum number of edges that a graph keeps from one item: those that were counted most often."""


def count_statistics(
    sequences: Sequence[NDArray[np.int32]], titles: Sequence[str], trained: int, encoder: WordEncoder | None = None
) -> ItemStatistics:
    """Return the statistics of a data set.

    An item that no training sequence contains counts as the least popular of the others.

    Args:
        sequences: training sequence of each user, oldest first.
        titles: titles of all items, those in the training sequences first.
        trained: number of items that may occur in the training sequences.
        encoder: encoder of the titles by their words; by default, one is fitted to the first ``trained`` titles.
    """
    encoder = encoder or fit_words(titles[:trained], dimensions=0)
    counts = np.bincount(np.concatenate(sequences), minlength=len(titles) + 1)
    popularity = np.log1p(counts)
    # Nothing is known of an untrained item's popularity, and 0 would keep it out of every list.
    popularity[trained + 1 :] = popularity[1 : trained + 1].min()
    rows = encoder.rows(["", *titles])  # the padding has no title
    graphs = count_transitions(sequences, len(titles)), count_co_occurrence(sequences, len(titles))
    return ItemStatistics(popularity.astype(np.float32), TitleLikeness(rows), *graphs)


def count_transitions(sequences: Sequence[NDArray[np.int32]], items: int) -> ItemGraph:
    """Return how often each item followed each other one in the training sequences.

    Args:
        sequences: item numbers of each user, oldest first.
        items: number of items; item numbers are 1..items.
    """
    return ItemGraph(_most_frequent(_pairs(sequences, items, {d: 1 / d for d in range(1, REACH + 1)})))


def count_co_occurrence(sequences: Sequence[NDArray[np.int32]], items: int) -> ItemGraph:
    """Return how often two items are near each other in the training sequences, relative to how often each occurs.

    An edge is ``c / (n * m) ** DISCOUNT`` for ``c`` pairs of two items that occur ``n`` and ``m`` times.

    Args:
        sequences: item numbers of each user, oldest first.
        items: number of items; item numbers are 1..items.
    """
    pairs = _pairs(sequences, items, dict.fromkeys(range(1, NEAR + 1), 1.0))
    kept = _most_frequent(csr_array(pairs + pairs.T))
    occurrences = np.bincount(np.concatenate(sequences), minlength=items + 1).astype(np.float64)
    start = np.repeat(np.arange(items + 1), np.diff(kept.offsets))
    edges = kept.values / (occurrences[start] * occurrences[kept.columns]) ** DISCOUNT
    return ItemGraph(kept._replace(values=edges.astype(np.float32)))


def _pairs(sequences: Sequence[NDArray[np.int32]], items: int, weights: Mapping[int, float]) -> csr_array:
    """Return how often an item [row] is before another one [column], each distance with its weight."""
    everything = np.concatenate(sequences)
    user = np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])
    total = csr_array((items + 1, items + 1), dtype=np.float64)
    for distance, weight in weights.items():
        same = user[distance:] == user[:-distance]
        if not same.any():  # no sequence is longer
            break
        earlier, later = everything[:-distance][same], everything[distance:][same]
        pairs = (np.full(len(earlier), weight), (earlier, later))
        total = total + csr_array(pairs, shape=total.shape)
    return total


def _most_frequent(counts: csr_array) -> SparseRows:
    """Return the matrix with at most :data:`MOST_EDGES` entries in a row; ties go to the smaller item number."""
    counts.sort_indices()
    offsets, kept = counts.indptr, np.ones(counts.nnz, np.bool_)
    for row in np.flatnonzero(np.diff(offsets) > MOST_EDGES):
        edges = slice(offsets[row], offsets[row + 1])
        rarest = np.argsort(-counts.data[edges], kind="stable")[MOST_EDGES:]
        kept[edges][rarest] = False
    starts = np.concatenate(([0], np.cumsum(kept)))[offsets]
    return SparseRows(
        starts.astype(np.int64), counts.indices[kept].astype(np.int32), counts.data[kept].astype(np.float32)
    )


def fit_weights(sources: Sequence[NDArray[np.float64]], truths: Sequence[int], retrievers: int) -> dict[str, float]:
    """Return the weight of each retriever and signal under which the users' true items are most probable.

    Without a user there is nothing to fit, and the weights keep the order of the first retriever.

    Args:
        sources: for each user, the retrievers' logits and the signals of a pool of candidates [k, retrievers +
            signals].
        truths: position (from 0) of each user's true item in the pool.
        retrievers: number of retrievers.
    """
    names = (*RETRIEVERS[:retrievers], *SIGNALS)
    weights = fit_pool(sources, truths) if truths else np.eye(len(names))[0]
    return dict(zip(names, map(float, weights), strict=True))
