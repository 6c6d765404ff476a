"""Reorders a retriever's candidates by cheap signals: popularity, title likeness, transitions and co-occurrence.

The scores of one or two retrievers and the signals are added with weights that were fitted by likelihood on validation
users (:mod:`models.signals.fitting`); a signal that does not help has weight 0.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from models.signals.graph import ItemGraph
from models.signals.likeness import TitleLikeness
from models.sparse import SparseRows

WEIGHTS_FILE = "signals.json"
STATISTICS_FILE = "signals.safetensors"
RECENT = 10
"""Number of most recent history items that all signals but popularity look at."""
SIGNALS = ("popularity", "likeness_mean", "likeness_max", "likeness_last", "transitions", "co_occurrence")
GRAPHS = ("transitions", "co_occurrence")
"""Signals that are graphs of items."""
RETRIEVERS = ("retriever", "second_retriever")
"""Names of the weights of the retrievers' own scores."""


@dataclass(frozen=True)
class ItemStatistics:
    """What the signals read: statistics of titles and of training sequences, by item number."""

    popularity: NDArray[np.float32]
    """log(1 + the number of occurrences in the training sequences) [items + 1]; the lowest for an untrained item."""
    likeness: TitleLikeness
    transitions: ItemGraph
    """How often an item followed another one."""
    co_occurrence: ItemGraph
    """How often two items came near each other, relative to how often each occurs."""

    def signals(self, history: NDArray[np.int32], items: NDArray[np.int32]) -> NDArray[np.float64]:
        """Return the signals [k, signals] of some items, in the order of :data:`SIGNALS`.

        Args:
            history: item numbers, oldest first.
            items: item numbers [k], distinct.
        """
        recent = history[-RECENT:][::-1]
        found = np.zeros((len(items), len(SIGNALS)))
        found[:, 0] = self.popularity[items]
        if len(recent):
            likeness = self.likeness(items, recent)  # [k, recent]
            found[:, 1], found[:, 2], found[:, 3] = likeness.mean(axis=1), likeness.max(axis=1), likeness[:, 0]
            found[:, 4] = np.log1p(self.transitions(items, recent))
            found[:, 5] = self.co_occurrence(items, recent)
        return found

    def with_added(self, titles: SparseRows, trained: int) -> "ItemStatistics":
        """Return the statistics with further items, of which no more is known than of an untrained one.

        Args:
            titles: TF-IDF weights of their titles.
            trained: number of trained items.
        """
        lowest = self.popularity[1 : trained + 1].min()
        popularity = np.concatenate((self.popularity, np.full(len(titles.offsets) - 1, lowest)))
        likeness = TitleLikeness(SparseRows.of([self.likeness.rows, titles]))
        return replace(self, popularity=popularity, likeness=likeness)

    def save(self, folder: Path) -> None:
        """Write the statistics into an existing folder."""
        matrices = {"titles": self.likeness.rows, **{name: getattr(self, name).edges for name in GRAPHS}}
        parts = {f"{name}.{part}": array for name, rows in matrices.items() for part, array in rows._asdict().items()}
        save_file({"popularity": self.popularity, **parts}, folder / STATISTICS_FILE)

    @classmethod
    def load(cls, folder: Path) -> "ItemStatistics":
        """Return the statistics that :meth:`save` wrote; a graph that an earlier version did not count is empty."""
        tensors = load_file(folder / STATISTICS_FILE)

        def matrix(name: str) -> SparseRows:
            return SparseRows(*(tensors[f"{name}.{part}"] for part in SparseRows._fields))

        graphs = (ItemGraph(matrix(name) if f"{name}.offsets" in tensors else SparseRows.empty()) for name in GRAPHS)
        return cls(tensors["popularity"], TitleLikeness(matrix("titles")), *graphs)


@dataclass(frozen=True)
class Signals:
    """A weighted sum of the retrievers' scores and of the signals, over a pool of candidates."""

    statistics: ItemStatistics
    weights: Mapping[str, float]
    """Weight of each retriever (:data:`RETRIEVERS`, as many as there are) and of each of :data:`SIGNALS`; 0 for one
    that is missing, as in an artifact of an earlier version."""
    pool: int
    """Number of best items of each retriever among which the signals choose."""

    def scores(
        self, history: NDArray[np.int32], items: NDArray[np.int32], logits: NDArray[np.float32]
    ) -> NDArray[np.float64]:
        """Return the weighted sums [k] for some items.

        Args:
            history: item numbers, oldest first.
            items: item numbers [k], distinct.
            logits: the retrievers' logits of the items [k, retrievers].
        """
        sources = np.concatenate((logits, self.statistics.signals(history, items)), axis=1)
        names = (*RETRIEVERS[: logits.shape[1]], *SIGNALS)
        weights = np.array([self.weights.get(name, 0.0) for name in names])
        sums: NDArray[np.float64] = (sources * weights).sum(axis=1)
        return sums

    def with_added(self, titles: SparseRows, trained: int) -> "Signals":
        """Return the same signals with further items; see :meth:`ItemStatistics.with_added`."""
        return Signals(self.statistics.with_added(titles, trained), self.weights, self.pool)

    def save(self, folder: Path) -> None:
        """Write weights and statistics into an existing folder."""
        self.statistics.save(folder)
        stored = {"pool": self.pool, "weights": dict(self.weights)}
        (folder / WEIGHTS_FILE).write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Signals | None":
        """Return the signals that :meth:`save` wrote; None if the folder has none."""
        if not (folder / WEIGHTS_FILE).is_file():
            return None
        stored = json.loads((folder / WEIGHTS_FILE).read_text(encoding="utf-8"))
        return cls(ItemStatistics.load(folder), stored["weights"], stored["pool"])
