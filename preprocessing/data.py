"""Reads a preprocessed data set for the later stages, without NVTabular."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from preprocessing.artifacts import read_manifest
from preprocessing.catalogue import ITEMS_FILE, Catalogue

KIND = "data"
SEQUENCES_FOLDER = "sequences"
INTERACTIONS_FILE = "interactions.parquet"
"""File of all checked raw interactions, for a later append."""
ADDED_FILE = "added.parquet"
"""File of the titles that came from a store of added items; absent if none did."""
STATISTICS_FILE = "statistics.json"
TYPES = {"user": pa.string(), "training": pa.list_(pa.int32()), "validation": pa.int32(), "test": pa.int32()}
"""Columns of the sequences and their types."""


@dataclass(frozen=True)
class Statistics:
    """One row of the paper's Table 2."""

    dataset: str
    users: int
    items: int
    interactions: int

    @property
    def mean_length(self) -> float:
        """Mean number of interactions per user."""
        return self.interactions / self.users

    @property
    def density(self) -> float:
        """Share of all pairs of user and item that are interactions."""
        return self.interactions / (self.users * self.items)

    def row(self) -> dict[str, Any]:
        """Return the row, under the column names of the paper's Table 2."""
        return {
            "dataset": self.dataset,
            "users": self.users,
            "items": self.items,
            "interactions": self.interactions,
            "mean_length": round(self.mean_length, 3),
            "density": round(self.density, 6),
        }

    @classmethod
    def read(cls, folder: Path) -> "Statistics":
        """Return the statistics in ``statistics.json`` of a data artifact."""
        row = json.loads((folder / STATISTICS_FILE).read_text(encoding="utf-8"))
        return cls(row["dataset"], row["users"], row["items"], row["interactions"])


@dataclass(frozen=True)
class Data:
    """A data set: users' sequences of item numbers, split leave-one-out (paper, section 4.0.2)."""

    name: str
    """Name of the data set."""
    fingerprint: str
    """Fingerprint of the data artifact."""
    statistics: Statistics
    catalogue: Catalogue
    users: list[str]
    """Raw user ids."""
    training: list[NDArray[np.int32]]
    """All but the last two items of each user, in chronological order."""
    validation: NDArray[np.int32]
    """Second-to-last item of each user [users]."""
    test: NDArray[np.int32]
    """Last item of each user [users]."""

    def test_histories(self) -> list[NDArray[np.int32]]:
        """Return the items before each user's test item: the training items and the validation item, oldest first."""
        return [np.append(*parts) for parts in zip(self.training, self.validation, strict=True)]

    def raw_history(self, user: int) -> list[str]:
        """Return the raw ids of the items before a user's test item, oldest first.

        Args:
            user: index of the user, from 0.
        """
        items = (*self.training[user], self.validation[user])
        return [self.catalogue.raw(int(item)).decode() for item in items]


def read_sequences(folder: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Yield the sequences of a data artifact, file by file, in the order of the users."""
    paths = (folder / SEQUENCES_FOLDER).glob("part_*.parquet")
    for path in sorted(paths, key=lambda path: int(path.stem.removeprefix("part_"))):
        table = pq.read_table(path, columns=columns)
        yield table.cast(pa.schema([field.with_type(TYPES[field.name]) for field in table.schema.remove_metadata()]))


def load_data(artifacts: Path) -> Data:
    """Return the data set in ``artifacts/data``.

    Raises:
        InputError: the folder is missing or was not written by `llamarec preprocess`.
    """
    folder = artifacts / "data"
    manifest = read_manifest(folder, KIND, "llamarec preprocess")
    table = pa.concat_tables(read_sequences(folder))
    offsets = table["training"].combine_chunks().offsets.to_numpy()
    items = table["training"].combine_chunks().values.to_numpy()
    return Data(
        name=manifest.facts["dataset"],
        fingerprint=manifest.fingerprint,
        statistics=Statistics.read(folder),
        catalogue=Catalogue.load(folder / ITEMS_FILE),
        users=table["user"].to_pylist(),
        training=np.split(items, offsets[1:-1]),
        validation=table["validation"].to_numpy(),
        test=table["test"].to_numpy(),
    )
