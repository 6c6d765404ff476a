"""Reads a preprocessed data set as the first part of a longer one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from preprocessing.artifacts import Manifest, read_manifest
from preprocessing.catalogue import ITEMS_FILE
from preprocessing.data import INTERACTIONS_FILE, KIND
from preprocessing.readers import parquet_batches
from preprocessing.report import ReadingLog
from preprocessing.values import Batch


@dataclass(frozen=True)
class Previous:
    """The result of an earlier run: all checked interactions and titles, and the item numbers."""

    manifest: Manifest
    interactions: Path
    catalogue: pa.Table

    @property
    def times(self) -> Mapping[str, Any] | None:
        """How the times were read; None for artifacts of version 0.1.0, whose times are numbers like any others."""
        found: Mapping[str, Any] | None = self.manifest.facts.get("reading", {}).get("times")
        return found

    def numbered(self) -> list[str]:
        """Return the raw ids of the items in the models' vocabulary, in the order of their numbers, which they keep."""
        known: list[str] = self.catalogue.filter(self.catalogue["training_count"].is_valid())["raw"].to_pylist()
        return known

    def titles(self) -> dict[str, str]:
        """Return the title of each item by its raw id."""
        return dict(zip(self.catalogue["raw"].to_pylist(), self.catalogue["title"].to_pylist(), strict=True))

    def batches(self, log: ReadingLog) -> Iterator[Batch]:
        """Yield all interactions, with the kind of their times where that was recorded."""
        columns = {name: name for name in ("user", "item", "timestamp")}
        for batch in parquet_batches(self.interactions, columns, log):
            log.files[self.interactions].format = "earlier data"
            yield batch._replace(kind=self.times["kind"] if self.times else None)


def load_previous(folder: Path) -> Previous:
    """Return the data set in a folder such as ``artifacts/data``.

    Raises:
        InputError: the folder is missing or was not written by `llamarec preprocess`.
    """
    manifest = read_manifest(folder, KIND, "llamarec preprocess")
    return Previous(manifest, folder / INTERACTIONS_FILE, pq.read_table(folder / ITEMS_FILE))
