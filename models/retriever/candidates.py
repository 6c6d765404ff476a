"""From scores to candidates: masks, the top 20, and the true item's place among all items."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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
    }
)
"""Columns of a file of candidates."""

LOWEST = np.finfo(np.float32).min
"""What every score of an item that is not masked reaches."""


class Candidates(NamedTuple):
    """Items to rank, in the retriever's order."""

    items: NDArray[np.int32]
    """[k] item numbers."""
    scores: NDArray[np.float32]
    """[k] logits; -inf for an item that the retriever does not know."""
    ranks: NDArray[np.int32]
    """[k] places from 1; 0 for an item that the retriever does not know."""

    def probabilities(self) -> NDArray[np.float32]:
        """Softmax of the scores over the candidates [k]: what retrieval alone answers."""
        known = np.isfinite(self.scores)
        weights = np.zeros(len(self.scores), dtype=np.float64)
        if known.any():
            logits = self.scores[known].astype(np.float64)
            weights[known] = np.exp(logits - logits.max())
            weights /= weights.sum()
        return weights.astype(np.float32)


def best_first(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """Places [k] in descending order of score; equal scores keep their order."""
    return np.argsort(-scores, kind="stable")


def mask(scores: NDArray[np.float32], items: NDArray[np.int32]) -> None:
    """Sets the padding's score and those of ``items`` to -inf in a row of scores [items + 1]."""
    scores[0] = -np.inf
    scores[items] = -np.inf


def top_candidates(scores: NDArray[np.float32], masked: NDArray[np.int32], k: int) -> Candidates:
    """The best ``k`` items of a row of scores.

    Args:
        scores: [items + 1], the padding's at 0; changed in place: masked items become -inf.
        masked: item numbers that must not be returned.
        k: how many, fewer when the catalogue has no more.
    """
    mask(scores, masked)
    # The k-th best of the best of every 64 items: at least k items reach it, and few more. Two passes over the scores.
    reached, groups = LOWEST, len(scores) // 64
    if groups >= k:
        best = scores[: 64 * groups].reshape(64, groups).max(axis=0)
        reached = max(np.partition(best, groups - k)[groups - k], LOWEST)
    items = np.flatnonzero(scores >= reached)  # in order of item number
    items = items[best_first(scores[items])][:k]
    return Candidates(items.astype(np.int32), scores[items], np.arange(1, len(items) + 1, dtype=np.int32))


def given_candidates(scores: NDArray[np.float32], items: NDArray[np.int32]) -> Candidates:
    """The caller's items in the retriever's order; those beyond its vocabulary come last, with rank 0.

    Args:
        scores: [known items + 1].
        items: [k] distinct item numbers.
    """
    known = items[items < len(scores)]
    unknown = items[items >= len(scores)]
    known = known[np.lexsort((known, -scores[known]))]
    return Candidates(
        np.concatenate((known, unknown)).astype(np.int32),
        np.concatenate((scores[known], np.full(len(unknown), -np.inf))).astype(np.float32),
        np.concatenate((np.arange(1, len(known) + 1), np.zeros(len(unknown)))).astype(np.int32),
    )


def place_of(scores: NDArray[np.float32], item: int) -> int:
    """The place of ``item`` from 1 in a masked row of scores, ties to the smaller item number; 0 when it is masked."""
    if not np.isfinite(scores[item]):
        return 0
    better = np.count_nonzero(scores > scores[item])
    return better + np.count_nonzero(scores[:item] == scores[item]) + 1


class CandidateWriter:
    """Writes users' candidates to Parquet as they come, with the columns ``user, items, scores, truth, rank``.

    It holds one row group at most. Use it as a context manager; :class:`CandidateTable` reads the file.
    """

    def __init__(self, path: Path, rows_at_once: int = 1 << 16) -> None:
        """Args:
        path: the file.
        rows_at_once: users of a row group.
        """
        self._file = pq.ParquetWriter(path, SCHEMA)
        self._rows_at_once = rows_at_once
        self._waiting: list[pa.RecordBatch] = []

    def __enter__(self) -> "CandidateWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._file.close()

    def write(
        self, users: Sequence[str], candidates: Sequence[Candidates], truth: NDArray[np.int32], ranks: NDArray[np.int32]
    ) -> None:
        """Adds some users; the columns are those of :class:`CandidateTable`."""
        offsets = np.cumsum([0, *(len(row.items) for row in candidates)]).astype(np.int32)
        columns = [
            pa.array(users, pa.string()),
            pa.ListArray.from_arrays(offsets, pa.array(np.concatenate([row.items for row in candidates]))),
            pa.ListArray.from_arrays(offsets, pa.array(np.concatenate([row.scores for row in candidates]))),
            pa.array(truth, pa.int32()),
            pa.array(ranks, pa.int32()),
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
    """The retriever's candidates of every user, beside the item that came next."""

    users: list[str]
    candidates: list[Candidates]
    truth: NDArray[np.int32]
    """[users] the item that came next."""
    ranks: NDArray[np.int32]
    """[users] its place among all items from 1; 0 when it was masked."""

    @classmethod
    def read(cls, path: Path) -> "CandidateTable":
        """What :class:`CandidateWriter` wrote."""
        table = pq.read_table(path).combine_chunks()
        items, scores = (table[name].combine_chunks() for name in ("items", "scores"))
        ends = items.offsets.to_numpy()[1:-1]
        candidates = [
            Candidates(some, values, np.arange(1, len(some) + 1, dtype=np.int32))
            for some, values in zip(
                np.split(items.values.to_numpy(), ends), np.split(scores.values.to_numpy(), ends), strict=True
            )
        ]
        return cls(table["user"].to_pylist(), candidates, table["truth"].to_numpy(), table["rank"].to_numpy())
