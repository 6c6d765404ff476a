"""Reads a preprocessed data set as the first part of a longer one."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from preprocessing.artifacts import Manifest, read_manifest
from preprocessing.catalogue import ITEMS_FILE
from preprocessing.data import INTERACTIONS_FILE, KIND
from preprocessing.ingest import RawTables
from preprocessing.readers import parquet_batches


@dataclass(frozen=True)
class Previous:
    """The result of an earlier run: all checked interactions and titles, and the item numbers."""

    manifest: Manifest
    interactions: Path
    catalogue: pa.Table

    def numbered(self) -> list[str]:
        """Return the raw ids of the items in the models' vocabulary, in the order of their numbers, which they keep."""
        known: list[str] = self.catalogue.filter(self.catalogue["training_count"].is_valid())["raw"].to_pylist()
        return known


def load_previous(folder: Path) -> Previous:
    """Return the data set in a folder such as ``artifacts/data``.

    Raises:
        InputError: the folder is missing or was not written by `llamarec preprocess`.
    """
    manifest = read_manifest(folder, KIND, "llamarec preprocess")
    return Previous(manifest, folder / INTERACTIONS_FILE, pq.read_table(folder / ITEMS_FILE))


def joined(previous: Previous, new: RawTables) -> RawTables:
    """Return the earlier and the new interactions and titles; ids are integers only if they are integers in both."""
    before = pq.read_schema(previous.interactions)
    first = next(new.interactions(), None)
    kinds = {
        name: before.field(name).type
        if first is None or first.schema.field(name).type == before.field(name).type
        else pa.string()
        for name in ("user", "item")
    }

    def typed(table: pa.Table) -> pa.Table:
        for name, kind in kinds.items():
            if name in table.column_names:
                table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))
        return table

    def interactions() -> Iterator[pa.Table]:
        columns = {name: name for name in ("user", "item", "timestamp")}
        for table in parquet_batches(previous.interactions, columns):
            yield typed(table)
        for table in new.interactions():
            yield typed(table)

    def titles() -> Iterator[pa.Table]:
        earlier = pa.table([previous.catalogue["raw"], previous.catalogue["title"]], names=["item", "title"])
        yield typed(earlier)
        for table in new.titles() if new.titles else ():
            cleaned = [None if title is None else new.clean(title) for title in table["title"].to_pylist()]
            yield typed(pa.table([table["item"], pa.array(cleaned, pa.string())], names=["item", "title"]))

    return RawTables(interactions, titles)
