"""The catalogue: raw item ids, item numbers and titles. Read inside the Triton steps, so it needs no pandas."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ITEMS_FILE = "items.parquet"


class Catalogue:
    """Items by number, from 1; 0 is the padding.

    Numbers up to :attr:`trained` survived 5-core filtering and have an embedding. Those above have a title only: they
    may be ranked as given candidates, and nothing else knows them.
    """

    def __init__(self, ids: Sequence[bytes], titles: Sequence[str], counts: Sequence[int]) -> None:
        """Args:
        ids: raw ids in the order of their numbers.
        titles: of the same items.
        counts: how often each item stands in a training sequence; as many as the retriever knows items, from the first.
        """
        self._ids = list(ids)
        self._titles = list(titles)
        self._numbers = {raw: number for number, raw in enumerate(self._ids, start=1)}
        self.counts = list(counts)
        self.trained = len(self.counts)

    @classmethod
    def load(cls, path: Path) -> "Catalogue":
        """Reads ``items.parquet``."""
        table = pq.read_table(path)
        ids = [raw.encode() for raw in table["raw"].to_pylist()]
        counts = [count for count in table["training_count"].to_pylist() if count is not None]
        return cls(ids, table["title"].to_pylist(), counts)

    def write(self, path: Path) -> None:
        """Parquet with the columns ``item, raw, title, training_count``; null where the retriever knows no item."""
        numbers = range(1, len(self) + 1)
        columns = {
            "item": pa.array(numbers, pa.int32()),
            "raw": pa.array([raw.decode() for raw in self._ids], pa.string()),
            "title": pa.array(self._titles, pa.string()),
            "training_count": pa.array([*self.counts, *[None] * (len(self) - self.trained)], pa.int64()),
        }
        pq.write_table(pa.table(columns), path)

    def __len__(self) -> int:
        return len(self._ids)

    def number(self, raw: bytes) -> int | None:
        """The item number of a raw id, exactly as in the raw file; None when it is not in the catalogue."""
        return self._numbers.get(raw)

    def raw(self, item: int) -> bytes:
        """The raw id of an item number."""
        return self._ids[item - 1]

    def title(self, item: int) -> str:
        """The title of an item number."""
        return self._titles[item - 1]

    def title_of(self, raw_id: str) -> str:
        """Return the title of a raw id; empty when the id is not in the catalogue."""
        item = self.number(raw_id.encode())
        return "" if item is None else self.title(item)
