"""Selects candidates from the retriever's scores: masks, the top k, and the rank of the true item among all items."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

SCHEMA = pa.schema(
    {
        "user": pa.string(),
        "items": pa.list_(pa.int32()),
        "scores": pa.list_(pa.float32()),
        "truth": pa.int32(),
        "rank": pa.int32(),
        "model_rank": pa.int32(),
    }
)
"""Columns of a candidates file."""

LOWEST = np.finfo(np.float32).min
"""Lower bound of every score that is not masked."""


class Candidates(NamedTuple):
    """Items to rank, in the order of the retrieval stage."""

    items: NDArray[np.int32]
    """Item numbers [k]; a negative one stands for a text of the request that describes no item of the catalogue."""
    scores: NDArray[np.float32]
    """Logits or log-probabilities [k]; -inf for an item outside the retriever's vocabulary."""
    ranks: NDArray[np.int32]
    """Ranks [k], from 1; 0 for an item outside the retriever's vocabulary."""
    boosts: NDArray[np.float32] | None = None
    """What a policy adds to the log-probabilities of an answer [k]; None for nothing. Not part of ``scores``."""

    def first(self, k: int) -> "Candidates":
        """Return the first ``k`` candidates, with their log-probabilities among themselves as scores."""
        scores = self.scores[:k].astype(np.float64)
        known = np.isfinite(scores)
        if known.any():
            shifted = scores - scores[known].max()
            scores = shifted - np.log(np.exp(shifted).sum())
        boosts = None if self.boosts is None else self.boosts[:k]
        return Candidates(self.items[:k], scores.astype(np.float32), self.ranks[:k], boosts)

    def comparable(self) -> "Candidates":
        """Return the candidates without scores if one of them has none: then only the language model compares all."""
        if np.isfinite(self.scores).all():
            return self
        return self._replace(scores=np.full_like(self.scores, -np.inf))

    def probabilities(self) -> NDArray[np.float32]:
        """Return the softmax of scores and boosts over the candidates [k], the scores of a retrieval-only answer."""
        known = np.isfinite(self.scores)
        weights = np.zeros(len(self.scores), dtype=np.float64)
        if known.any():
            logits = self.scores[known].astype(np.float64)
            if self.boosts is not None:
                logits += self.boosts[known]
            weights[known] = np.exp(logits - logits.max())
            weights /= weights.sum()
        return weights.astype(np.float32)


def best_first(scores: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    """Return the indices [k] that sort scores in descending order; equal scores keep their order."""
    return np.argsort(-scores, kind="stable")


def mask(scores: NDArray[np.float32], items: NDArray[np.int32]) -> None:
    """Set the scores of the padding and of ``items`` to -inf, in place, in a row of scores [items + 1]."""
    scores[0] = -np.inf
    scores[items] = -np.inf


def top_candidates(scores: NDArray[np.float32], masked: NDArray[np.int32], k: int) -> Candidates:
    """Return the best ``k`` items of a row of scores.

    Args:
        scores: scores [items + 1], with the padding's at index 0; masked items are set to -inf in place.
        masked: item numbers that must not be returned.
        k: number of items; fewer are returned if the catalogue has no more.
    """
    mask(scores, masked)
    # The threshold is the k-th best of the maxima of groups of items: at least k items reach it, and few more do if
    # there are several times k groups. This takes two passes over the scores.
    reached, size = LOWEST, min(64, len(scores) // (4 * k))
    if size > 1:
        groups = len(scores) // size
        best = scores[: size * groups].reshape(size, groups).max(axis=0)
        reached = max(np.partition(best, groups - k)[groups - k], LOWEST)
    items = np.flatnonzero(scores >= reached)  # in order of item number
    items = items[best_first(scores[items])][:k]
    return Candidates(items.astype(np.int32), scores[items], np.arange(1, len(items) + 1, dtype=np.int32))


def in_vocabulary(items: NDArray[np.int32], rows: int) -> NDArray[np.bool_]:
    """Return which items [k] have a score in a row of ``rows`` scores, the padding's included."""
    found: NDArray[np.bool_] = (items > 0) & (items < rows)
    return found


def given_candidates(scores: NDArray[np.float32], items: NDArray[np.int32]) -> Candidates:
    """Return the caller's items in the retriever's order; items outside its vocabulary come last, with rank 0.

    Args:
        scores: scores [items in the vocabulary + 1].
        items: distinct item numbers [k].
    """
    is_known = in_vocabulary(items, len(scores))
    known, unknown = items[is_known], items[~is_known]
    known = known[np.lexsort((known, -scores[known]))]
    return Candidates(
        np.concatenate((known, unknown)).astype(np.int32),
        np.concatenate((scores[known], np.full(len(unknown), -np.inf))).astype(np.float32),
        np.concatenate((np.arange(1, len(known) + 1), np.zeros(len(unknown)))).astype(np.int32),
    )


def place_of(scores: NDArray[np.float32], item: int) -> int:
    """Return the rank (from 1) of ``item`` in a masked row of scores; ties go to the smaller number.

    It is 0 for an item that is masked, or that the row has no score of.
    """
    if item >= len(scores) or not np.isfinite(scores[item]):
        return 0
    better = np.count_nonzero(scores > scores[item])
    return better + np.count_nonzero(scores[:item] == scores[item]) + 1


class CandidateWriter:
    """A streaming writer of users' candidates to Parquet, with the columns :data:`SCHEMA`.

    It holds at most one row group in memory. Use it as a context manager; :class:`CandidateTable` reads the file.

    Args:
        path: the file.
        rows_at_once: number of users in a row group.
    """

    def __init__(self, path: Path, rows_at_once: int = 1 << 16) -> None:
        self._file = pq.ParquetWriter(path, SCHEMA)
        self._rows_at_once = rows_at_once
        self._waiting: list[pa.RecordBatch] = []

    def __enter__(self) -> "CandidateWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._file.close()

    def write(
        self,
        users: Sequence[str],
        candidates: Sequence[Candidates],
        truth: NDArray[np.int32],
        ranks: NDArray[np.int32],
        model_ranks: NDArray[np.int32],
    ) -> None:
        """Add users; the arguments are the columns of :class:`CandidateTable`."""
        offsets = np.cumsum([0, *(len(row.items) for row in candidates)]).astype(np.int32)
        columns = [
            pa.array(users, pa.string()),
            pa.ListArray.from_arrays(offsets, pa.array(np.concatenate([row.items for row in candidates]))),
            pa.ListArray.from_arrays(offsets, pa.array(np.concatenate([row.scores for row in candidates]))),
            pa.array(truth, pa.int32()),
            pa.array(ranks, pa.int32()),
            pa.array(model_ranks, pa.int32()),
        ]
        self._waiting.append(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))
        if sum(map(len, self._waiting)) >= self._rows_at_once:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._file.write_table(pa.Table.from_batches(self._waiting))
            self._waiting.clear()


@dataclass(frozen=True)
class CandidateTable:
    """Every user's candidates from the retrieval stage, and the item that came next."""

    users: list[str]
    """Raw user ids."""
    candidates: list[Candidates]
    truth: NDArray[np.int32]
    """Number of the item that came next [users]."""
    ranks: NDArray[np.int32]
    """Rank of that item among all items [users], from 1; 0 if it was masked."""
    model_ranks: NDArray[np.int32]
    """Its rank by the first retriever alone, without signals [users]."""

    @classmethod
    def read(cls, path: Path) -> "CandidateTable":
        """Return the table in a file that :class:`CandidateWriter` wrote, of this version or an earlier one."""
        table = pq.read_table(path).combine_chunks()
        ranks = table["rank"].to_numpy()
        # Earlier versions had no signals, and wrote one rank.
        alone = table["model_rank"].to_numpy() if "model_rank" in table.column_names else ranks
        items, scores = (table[name].combine_chunks() for name in ("items", "scores"))
        ends = items.offsets.to_numpy()[1:-1]
        candidates = [
            Candidates(some, values, np.arange(1, len(some) + 1, dtype=np.int32))
            for some, values in zip(
                np.split(items.values.to_numpy(), ends), np.split(scores.values.to_numpy(), ends), strict=True
            )
        ]
        return cls(table["user"].to_pylist(), candidates, table["truth"].to_numpy(), ranks, alone)
