"""Helpers that read raw data up to the checked interactions, without NVTabular, and give them as sequences."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from preprocessing.ingest import Raw, ingest
from preprocessing.preprocess import raw_order
from preprocessing.report import ReadingLog
from preprocessing.sources import SOURCES, Layout, raw_files

DEFAULT_LAYOUT = Layout()


def written_log() -> pd.DataFrame:
    """Return 20 users who see 12 items in an order of their own, one a day from 2020-09-13 on."""
    random = np.random.default_rng(0)
    rows = [
        (f"u{user}", f"i{item}", 1_600_000_000 + 86_400 * day, f"Thing {item}")
        for user in range(20)
        for day, item in enumerate(random.permutation(12))
    ]
    return pd.DataFrame(rows, columns=["user", "item", "timestamp", "title"])


LOG = written_log()
LATE = LOG.groupby("user")["timestamp"].rank() > 6
U0 = ["i9", "i2", "i7", "i4", "i5", "i11", "i0", "i3", "i6", "i10", "i8", "i1"]
"""Sequence of the first user of the log, as it was drawn."""


def ingested(
    raw: Path, scratch: Path, *, dataset: str = "table", skip: bool = False, layout: Layout = DEFAULT_LAYOUT
) -> tuple[Raw, ReadingLog]:
    """Return the data set in raw files, and the record of its reading.

    Args:
        raw: raw file or folder.
        scratch: folder for the interactions; it is created.
        dataset: kind of raw data.
        skip: whether bad rows are skipped.
        layout: layout of a ``table``.
    """
    scratch.mkdir(exist_ok=True)
    log = ReadingLog(skip)
    files = raw_files(dataset, raw)
    tables = SOURCES[dataset].read(files, raw, layout, log)
    return ingest(tables, scratch / "interactions.parquet", raw.name, log), log


def sequences(raw: Raw) -> dict[str, list[str]]:
    """Return each user's items in the order of time and then of their ids."""
    rows = pq.read_table(raw.interactions).to_pylist()
    key = raw_order([row["item"] for row in rows])
    ordered: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: (row["timestamp"], key(row["item"]))):
        ordered.setdefault(str(row["user"]), []).append(str(row["item"]))
    return ordered
