"""Items that are added while the server runs: a retriever knows them by their titles alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from models.sparse import SparseRows
from models.titles.words import WordEncoder, unit_rows

ARM_FILE = "text-arm.safetensors"
VECTORS_FILE = "item-vectors.npy"
ROWS_AT_ONCE, TITLES_AT_ONCE = 1 << 14, 1 << 10
"""Numbers of items and of titles whose similarities are computed together: 64 MiB."""


@dataclass(frozen=True)
class AddedVectors:
    """Vectors of items that a graph does not contain, which are numbered after those that it does."""

    first: int
    """Number of the first added item."""
    vectors: NDArray[np.float32]
    """[added, width]."""
    bias: NDArray[np.float32]
    """[added]; -inf for a place whose item is not retrieved by this number."""
    nearest: NDArray[np.int32]
    """Number of the item in the graph whose vector is most similar [added]."""
    words: SparseRows
    """TF-IDF weights of the titles [added, words]."""

    def scores(self, state: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits [added] of the added items for a history's state [width]."""
        scores: NDArray[np.float32] = self.vectors @ state + self.bias
        return scores

    def read_as(self, history: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return a history in which each added item is replaced by the most similar item of the graph."""
        added = history >= self.first
        if not added.any():
            return history
        read = history.copy()
        read[added] = self.nearest[history[added] - self.first]
        return read


class _Read(NamedTuple):
    """What is computed of one title."""

    vector: NDArray[np.float32]
    nearest: int
    words: SparseRows
    """One row."""


@dataclass(frozen=True)
class TextArm:
    """What a retriever learned of titles, by which an added item gets a vector like any untrained item."""

    encoder: WordEncoder
    projection: NDArray[np.float32]
    """From title vectors to item vectors [width, dimensions]."""
    bias: float
    """Bias of an item that was not trained: the lowest of all."""
    trained: int
    """Number of trained items."""
    vectors: NDArray[np.float32]
    """Vectors of the graph's items [items + 1, width], the padding's first."""

    def added(self, titles: Sequence[str | None]) -> AddedVectors:
        """Return the vectors of added items with these titles; a place without a title is not retrieved.

        What was computed of a title is kept, so that one item more costs little beside thousands of earlier ones.
        """
        new = sorted({title or "" for title in titles} - self._read.keys())
        for start in range(0, len(new), TITLES_AT_ONCE):
            self._learn(new[start : start + TITLES_AT_ONCE])
        read = [self._read[title or ""] for title in titles]
        bias = np.array([-np.inf if title is None else self.bias for title in titles], np.float32)
        return AddedVectors(
            len(self.vectors),
            np.stack([one.vector for one in read]),
            bias,
            np.array([one.nearest for one in read], np.int32),
            SparseRows.of([one.words for one in read]),
        )

    @cached_property
    def _read(self) -> dict[str, _Read]:
        return {}

    def _learn(self, titles: Sequence[str]) -> None:
        rows = self.encoder.rows(titles)
        vectors = self.encoder.vectors(rows) @ self.projection.T
        for place, (title, nearest) in enumerate(zip(titles, self._nearest(vectors).tolist(), strict=True)):
            self._read[title] = _Read(vectors[place], nearest, rows.row(place))

    def _nearest(self, vectors: NDArray[np.float32]) -> NDArray[np.int32]:
        """Return the number of the graph's item with the largest cosine similarity to each vector [added]."""
        unit = unit_rows(vectors)
        best = np.full(len(unit), -np.inf, np.float32)
        nearest = np.ones(len(unit), np.int32)
        for start in range(1, len(self.vectors), ROWS_AT_ONCE):
            similarities = unit @ unit_rows(np.asarray(self.vectors[start : start + ROWS_AT_ONCE])).T
            found = similarities.argmax(axis=1)
            reached = similarities[np.arange(len(unit)), found]
            better = reached > best
            best[better], nearest[better] = reached[better], start + found[better]
        return nearest

    def save(self, folder: Path) -> None:
        """Write the arm into an existing folder."""
        self.encoder.save(folder)
        arrays: dict[str, NDArray[Any]] = {
            "projection": np.ascontiguousarray(self.projection),
            "bias": np.array([self.bias], np.float32),
            "trained": np.array([self.trained], np.int64),
        }
        save_file(arrays, folder / ARM_FILE)
        np.save(folder / VECTORS_FILE, self.vectors)

    @classmethod
    def load(cls, folder: Path) -> "TextArm | None":
        """Return the arm that :meth:`save` wrote; None if the folder has none."""
        if not (folder / ARM_FILE).is_file():
            return None
        stored = load_file(folder / ARM_FILE)
        vectors = np.load(folder / VECTORS_FILE, mmap_mode="r", allow_pickle=False)
        encoder = WordEncoder.load(folder)
        return cls(encoder, stored["projection"], float(stored["bias"][0]), int(stored["trained"][0]), vectors)
