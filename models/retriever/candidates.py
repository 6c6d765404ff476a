"""From scores to candidates: masks, the top 20, and the true item's place among all items."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray


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


def top_candidates(scores: NDArray[np.float32], masked: NDArray[np.int32], k: int) -> Candidates:
    """The best ``k`` items of a row of scores.

    Args:
        scores: [items + 1], the padding's at 0; changed in place: masked items become -inf.
        masked: item numbers that must not be returned.
        k: how many, fewer when the catalogue has no more.
    """
    scores[0] = -np.inf
    scores[masked] = -np.inf
    k = min(k, int(np.isfinite(scores).sum()))
    if k == 0:
        return Candidates(np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.int32))
    # Everything that could be among the first k, ties at the edge included, in order of item number.
    edge = np.partition(scores, len(scores) - k)[len(scores) - k]
    items = np.flatnonzero(scores >= edge)
    items = items[best_first(scores[items])][:k]
    return Candidates(items.astype(np.int32), scores[items], np.arange(1, k + 1, dtype=np.int32))


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
    better = int((scores > scores[item]).sum())
    return better + int((scores[:item] == scores[item]).sum()) + 1


@dataclass(frozen=True)
class CandidateTable:
    """The retriever's candidates of every user, beside the item that came next."""

    users: list[str]
    candidates: list[Candidates]
    truth: NDArray[np.int32]
    """[users] the item that came next."""
    ranks: NDArray[np.int32]
    """[users] its place among all items from 1; 0 when it was masked."""

    def write(self, path: Path) -> None:
        """Parquet with the columns ``user, items, scores, truth, rank``."""
        table = pa.table(
            {
                "user": pa.array(self.users, pa.string()),
                "items": pa.array([row.items for row in self.candidates], pa.list_(pa.int32())),
                "scores": pa.array([row.scores for row in self.candidates], pa.list_(pa.float32())),
                "truth": pa.array(self.truth, pa.int32()),
                "rank": pa.array(self.ranks, pa.int32()),
            }
        )
        pq.write_table(table, path)

    @classmethod
    def read(cls, path: Path) -> "CandidateTable":
        """What :meth:`write` wrote."""
        table = pq.read_table(path)
        items, scores = table["items"].to_pylist(), table["scores"].to_pylist()
        candidates = [
            Candidates(np.array(i, np.int32), np.array(s, np.float32), np.arange(1, len(i) + 1, dtype=np.int32))
            for i, s in zip(items, scores, strict=True)
        ]
        return cls(table["user"].to_pylist(), candidates, table["truth"].to_numpy(), table["rank"].to_numpy())
