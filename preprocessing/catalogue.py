"""The catalogue of raw item ids, item numbers and titles. Triton steps read it, so it does not import pandas."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from preprocessing.groups import Groups

ITEMS_FILE = "items.parquet"


class Catalogue:
    """Items by number, from 1; 0 is the padding.

    Items up to number :attr:`trained` passed the k-core filter and are the retriever's vocabulary. Items above it have
    only a title, and can only be ranked as the caller's candidates.

    Args:
        ids: raw ids in the order of the item numbers.
        titles: titles in the same order.
        counts: number of occurrences in the training sequences of each item in the retriever's vocabulary, in the same
            order.
        groups: group of each item in the same order, None for an item without one; empty if no item has one.
    """

    def __init__(
        self, ids: Sequence[bytes], titles: Sequence[str], counts: Sequence[int], groups: Sequence[str | None] = ()
    ) -> None:
        self._ids = list(ids)
        self._titles = list(titles)
        self._numbers = {raw: number for number, raw in enumerate(self._ids, start=1)}
        self.counts = list(counts)
        self.trained = len(self.counts)
        self.groups = Groups.of(groups)

    @classmethod
    def load(cls, path: Path) -> "Catalogue":
        """Return the catalogue in an ``items.parquet`` file."""
        table = pq.read_table(path)
        ids = [raw.encode() for raw in table["raw"].to_pylist()]
        counts = [count for count in table["training_count"].to_pylist() if count is not None]
        groups = table["group"].to_pylist() if "group" in table.column_names else ()
        return cls(ids, table["title"].to_pylist(), counts, groups)

    def write(self, path: Path) -> None:
        """Write Parquet with the columns ``item, raw, title, training_count``; items without a count have null.

        If items have groups, there is a column ``group`` too, with null for an item without one.
        """
        numbers = range(1, len(self) + 1)
        columns = {
            "item": pa.array(numbers, pa.int32()),
            "raw": pa.array([raw.decode() for raw in self._ids], pa.string()),
            "title": pa.array(self._titles, pa.string()),
            "training_count": pa.array([*self.counts, *[None] * (len(self) - self.trained)], pa.int64()),
        }
        if self.groups.names:
            columns["group"] = pa.array(self.groups.values(), pa.string())
        pq.write_table(pa.table(columns), path)

    def with_added(self, added: Sequence[tuple[bytes, str]]) -> "Catalogue":
        """Return a catalogue with further items, which are numbered after its own and have only a title.

        An id that the catalogue knows already keeps its number and its title; the further number stands for nothing
        (:meth:`titles_after`).

        Args:
            added: raw id and title of each item.
        """
        if not added:
            return self
        whole = Catalogue(self._ids + [raw for raw, _ in added], self._titles + [title for _, title in added], ())
        whole._numbers |= self._numbers
        whole.counts, whole.trained = self.counts, self.trained
        whole.groups = self.groups.with_ungrouped(len(added))
        return whole

    def titles_after(self, item: int) -> list[str | None]:
        """Return the titles of the items after a number; None where the item is known by an earlier number."""
        later = range(item + 1, len(self) + 1)
        return [self.title(number) if self.number(self.raw(number)) == number else None for number in later]

    def __len__(self) -> int:
        return len(self._ids)

    def number(self, raw: bytes) -> int | None:
        """Return the item number of a raw id, exactly as in the raw file; None if it is not in the catalogue."""
        return self._numbers.get(raw)

    def numbers(self, raw_ids: Sequence[bytes]) -> list[int | None]:
        """Return :meth:`number` of each raw id."""
        return list(map(self._numbers.get, raw_ids))

    def raw(self, item: int) -> bytes:
        """Return the raw id of an item number."""
        return self._ids[item - 1]

    def title(self, item: int) -> str:
        """Return the title of an item number."""
        return self._titles[item - 1]

    def title_of(self, raw_id: str) -> str:
        """Return the title of a raw id; an empty string if the id is not in the catalogue."""
        item = self.number(raw_id.encode())
        return "" if item is None else self.title(item)
