"""Writes logs of answers and files of events as tests describe them."""

import csv
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from serving.steps.answers import DATASET_KEY, SCHEMA

START = datetime(2026, 3, 2, tzinfo=timezone.utc)
"""A midnight: seconds of the tests count from here."""
START_MS = int(START.timestamp() * 1000)


def shown(
    user: str | None,
    second: float,
    items: Sequence[str],
    *,
    release: str = "r1",
    ensemble: str = "llamarec",
    ranks: Sequence[int] | None = None,
    degraded: str | None = None,
    request: str = "",
) -> dict[str, Any]:
    """One row of the log; by default the retriever's order is that of the answer."""
    return {
        "request": request,
        "time": START_MS + round(second * 1000),
        "user": user,
        "release": release,
        "ensemble": ensemble,
        "items": list(items),
        "scores": [1 / len(items)] * len(items) if items else [],
        "retriever_ranks": list(ranks if ranks is not None else range(1, len(items) + 1)),
        "degraded": degraded,
    }


def write_log(folder: Path, rows: Iterable[dict[str, Any]], name: str = "1.parquet", dataset: str = "ml") -> Path:
    """Write one file of a log, and return its folder."""
    folder.mkdir(exist_ok=True)
    table = pa.Table.from_pylist(list(rows), SCHEMA.with_metadata({DATASET_KEY: dataset.encode()}))
    pq.write_table(table, folder / name)
    return folder


def write_events(path: Path, events: Iterable[tuple[str, str, float]]) -> Path:
    """Write users, items and seconds as a CSV with milliseconds."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "item", "timestamp"])
        writer.writerows([user, item, START_MS + round(second * 1000)] for user, item, second in events)
    return path
