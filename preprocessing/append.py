"""Reads a preprocessed data set as the first part of a longer one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from preprocessing.artifacts import Manifest, read_manifest
from preprocessing.catalogue import ITEMS_FILE
from preprocessing.data import ADDED_FILE, INTERACTIONS_FILE, KIND
from preprocessing.readers import parquet_batches
from preprocessing.report import ReadingLog
from preprocessing.values import Batch


@dataclass(frozen=True)
class Previous:
    """The result of an earlier run: all checked interactions and titles, and the item numbers."""

    manifest: Manifest
    interactions: Path
    catalogue: pa.Table
    added: Mapping[str, str]
    """Titles that came from a store of added items, as no raw file had one, by the raw ids."""

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
        """Return the title of each item of the raw files by its raw id."""
        titles = dict(zip(self.catalogue["raw"].to_pylist(), self.catalogue["title"].to_pylist(), strict=True))
        return {item: title for item, title in titles.items() if item not in self.added}

    def groups(self) -> dict[str, str]:
        """Return the group of each item that has one by its raw id."""
        if "group" not in self.catalogue.column_names:
            return {}
        groups = zip(self.catalogue["raw"].to_pylist(), self.catalogue["group"].to_pylist(), strict=True)
        return {item: group for item, group in groups if group is not None}

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
    added = read_added(folder / ADDED_FILE)
    return Previous(manifest, folder / INTERACTIONS_FILE, pq.read_table(folder / ITEMS_FILE), added)


def read_added(path: Path) -> dict[str, str]:
    """Return the titles that :func:`write_added` wrote; none if there is no such file."""
    if not path.is_file():
        return {}
    table = pq.read_table(path)
    return dict(zip(table["item"].to_pylist(), table["title"].to_pylist(), strict=True))


def write_added(path: Path, titles: Mapping[str, str]) -> None:
    """Write the titles that came from a store, if there are any, as Parquet with the columns ``item`` and ``title``."""
    if titles:
        columns = {"item": list(titles), "title": list(titles.values())}
        pq.write_table(pa.table(columns, pa.schema({name: pa.string() for name in columns})), path)
