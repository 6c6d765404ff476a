"""Reorders a retriever's candidates by cheap signals: popularity, title likeness and transitions between items.

The scores of one or two retrievers and the signals are added with weights that were fitted by likelihood on validation
users (:mod:`models.signals.fitting`); a signal that does not help has weight 0.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from models.signals.likeness import TitleLikeness
from models.signals.transitions import Transitions
from models.sparse import SparseRows

WEIGHTS_FILE = "signals.json"
STATISTICS_FILE = "signals.safetensors"
RECENT = 10
"""Number of most recent history items that likeness and transitions look at."""
SIGNALS = ("popularity", "likeness_mean", "likeness_max", "likeness_last", "transitions")
RETRIEVERS = ("retriever", "second_retriever")
"""Names of the weights of the retrievers' own scores."""


@dataclass(frozen=True)
class ItemStatistics:
    """What the signals read: statistics of titles and of training sequences, by item number."""

    popularity: NDArray[np.float32]
    """log(1 + the number of occurrences in the training sequences) [items + 1]; the median for an untrained item."""
    likeness: TitleLikeness
    transitions: Transitions

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
            found[:, 4] = self.transitions(items, recent)
        return found

    def with_added(self, titles: SparseRows, trained: int) -> "ItemStatistics":
        """Return the statistics with further items, of which no more is known than of an untrained one.

        Args:
            titles: TF-IDF weights of their titles.
            trained: number of trained items.
        """
        median = np.median(self.popularity[1 : trained + 1]).astype(np.float32)
        popularity = np.concatenate((self.popularity, np.full(len(titles.offsets) - 1, median)))
        return ItemStatistics(popularity, TitleLikeness(SparseRows.of([self.likeness.rows, titles])), self.transitions)

    def save(self, folder: Path) -> None:
        """Write the statistics into an existing folder."""
        titles, transitions = self.likeness.rows._asdict(), self.transitions.counts._asdict()
        tensors = {f"titles.{name}": array for name, array in titles.items()}
        tensors |= {f"transitions.{name}": array for name, array in transitions.items()}
        save_file({"popularity": self.popularity, **tensors}, folder / STATISTICS_FILE)

    @classmethod
    def load(cls, folder: Path) -> "ItemStatistics":
        """Return the statistics that :meth:`save` wrote."""
        tensors = load_file(folder / STATISTICS_FILE)
        titles, transitions = (
            SparseRows(*(tensors[f"{matrix}.{name}"] for name in SparseRows._fields))
            for matrix in ("titles", "transitions")
        )
        return cls(tensors["popularity"], TitleLikeness(titles), Transitions(transitions))


@dataclass(frozen=True)
class Signals:
    """A weighted sum of the retrievers' scores and of the signals, over a pool of candidates."""

    statistics: ItemStatistics
    weights: Mapping[str, float]
    """Weight of each retriever (:data:`RETRIEVERS`, as many as there are) and of each of :data:`SIGNALS`."""
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
        weights = np.array([self.weights[name] for name in (*RETRIEVERS[: logits.shape[1]], *SIGNALS)])
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
