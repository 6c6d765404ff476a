"""Counts the statistics that the signals read, and fits the signals' weights on validation users."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from models.conditional_logit import fit_pool
from models.signals.likeness import TitleLikeness
from models.signals.signals import RETRIEVERS, SIGNALS, ItemStatistics
from models.signals.transitions import Transitions
from models.sparse import SparseRows
from models.titles.fit_words import fit_words
from models.titles.words import WordEncoder

REACH = 3
"""Maximum distance of two items of a sequence that count as a transition; at distance d it counts 1 / d."""
MOST_FOLLOWERS = 500
"""Maximum number of followers that are kept of one item: those that followed most often."""


def count_statistics(
    sequences: Sequence[NDArray[np.int32]], titles: Sequence[str], trained: int, encoder: WordEncoder | None = None
) -> ItemStatistics:
    """Return the statistics of a data set.

    An item that no training sequence contains counts as one of median popularity.

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
    popularity[trained + 1 :] = np.median(popularity[1 : trained + 1])
    rows = encoder.rows(["", *titles])  # the padding has no title
    return ItemStatistics(popularity.astype(np.float32), TitleLikeness(rows), count_transitions(sequences, len(titles)))


def count_transitions(sequences: Sequence[NDArray[np.int32]], items: int) -> Transitions:
    """Return the transitions between the items of training sequences.

    Args:
        sequences: item numbers of each user, oldest first.
        items: number of items; item numbers are 1..items.
    """
    everything = np.concatenate(sequences)
    user = np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])
    total = csr_array((items + 1, items + 1), dtype=np.float64)
    for distance in range(1, REACH + 1):
        same = user[distance:] == user[:-distance]
        earlier, later = everything[:-distance][same], everything[distance:][same]
        pairs = (np.full(len(earlier), 1 / distance), (earlier, later))
        total = total + csr_array(pairs, shape=total.shape)
    return Transitions(_most_frequent(total))


def _most_frequent(counts: csr_array) -> SparseRows:
    """Return the matrix with at most :data:`MOST_FOLLOWERS` entries in a row; ties go to the smaller item number."""
    counts.sort_indices()
    lengths = np.diff(counts.indptr)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    order = np.lexsort((counts.indices, -counts.data, rows))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - np.repeat(counts.indptr[:-1], lengths)
    kept = rank < MOST_FOLLOWERS
    offsets = np.concatenate(([0], np.cumsum(np.bincount(rows[kept], minlength=len(lengths)))))
    return SparseRows(
        offsets.astype(np.int64), counts.indices[kept].astype(np.int32), counts.data[kept].astype(np.float32)
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
