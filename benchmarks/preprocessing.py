"""Measures time and memory of the data stage, compared with the same job in plain pandas and in polars.

    python -m benchmarks.preprocessing --rows 1000000 --json

The input is a Parquet file of interactions with zipf-distributed users and items. `preprocess` and the two references
apply the title filter, the 5-core, the numbering, the sequences and the split. Each runs in its own process, the three
take turns, and imports are not timed. The benchmark fails unless all three write the same sequences.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

CONTENDERS = ("llamarec", "pandas", "polars")
ROWS_PER_USER = 100
ROWS_PER_ITEM = 200
UNTITLED = 0.02
"""Share of the items without a title."""
MINIMUM = 5


def generate(rows: int, path: Path, seed: int = 0) -> None:
    """Write interactions with zipf-distributed users and items, a million rows at a time."""
    rng = np.random.default_rng(seed)
    users, items = max(rows // ROWS_PER_USER, 100), max(rows // ROWS_PER_ITEM, 100)
    untitled = rng.random(items) < UNTITLED
    schema = pa.schema({"user": pa.int64(), "item": pa.int64(), "timestamp": pa.int64(), "title": pa.string()})
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 1_000_000):
            count = min(1_000_000, rows - start)
            user, item = (zipf(rng, kinds, count) for kinds in (users, items))
            titles = np.char.add("title ", item.astype(str))
            columns = {
                "user": pa.array(user),
                "item": pa.array(item),
                "timestamp": pa.array(rng.integers(1_000_000_000, 1_700_000_000, count)),
                "title": pa.array(titles, pa.string(), mask=untitled[item]),
            }
            writer.write_table(pa.table(columns, schema))


def zipf(rng: np.random.Generator, kinds: int, count: int) -> NDArray[np.int64]:
    """Return ``count`` numbers r from 0 to ``kinds`` - 1, drawn with a probability proportional to 1 / (r + 10)."""
    weights = np.cumsum(1 / (np.arange(kinds) + 10))
    drawn: NDArray[np.int64] = np.searchsorted(weights, rng.random(count) * weights[-1])
    return drawn


def run_llamarec(raw: Path, folder: Path) -> float:
    """Return the seconds of `llamarec preprocess`, including everything that it writes."""
    from preprocessing import workflows  # noqa: F401 - imports are not timed
    from preprocessing.data import read_sequences
    from preprocessing.preprocess import Preprocessing, preprocess

    started = time.perf_counter()
    preprocess(Preprocessing(dataset="table", raw=raw, minimum=MINIMUM), folder)
    seconds = time.perf_counter() - started
    pq.write_table(pa.concat_tables(read_sequences(folder / "data")), folder / "sequences.parquet")
    return seconds


def run_pandas(raw: Path, folder: Path) -> float:
    """Return the seconds of the same job as one would write it in pandas."""
    import pandas as pd

    started = time.perf_counter()
    frame = pd.read_parquet(raw)
    titles = frame[["item", "title"]].dropna().sort_values(["item", "title"]).drop_duplicates("item")
    frame = frame.loc[frame["item"].isin(titles["item"]), ["user", "item", "timestamp"]]
    before = -1
    while len(frame) != before:
        before = len(frame)
        for column in ("item", "user"):
            counts = frame[column].value_counts()
            frame = frame[frame[column].isin(counts.index[counts >= MINIMUM])]
    counts = frame["item"].value_counts().rename_axis("item").reset_index(name="count")
    counts = counts.sort_values(["count", "item"], ascending=[False, True])
    frame = frame.rename(columns={"item": "raw"})
    frame["item"] = frame["raw"].map(pd.Series(range(1, len(counts) + 1), index=counts["item"])).astype("int32")
    frame = frame.sort_values(["user", "timestamp", "raw"])
    items, starts = frame["item"].to_numpy(), np.flatnonzero(frame["user"].diff().to_numpy() != 0)
    sequences = np.split(items, starts[1:])
    users = frame["user"].to_numpy()[starts]
    table = {
        "user": pa.array(users).cast(pa.string()),
        "training": pa.array([row[:-2] for row in sequences], pa.list_(pa.int32())),
        "validation": pa.array([row[-2] for row in sequences], pa.int32()),
        "test": pa.array([row[-1] for row in sequences], pa.int32()),
    }
    pq.write_table(pa.table(table), folder / "sequences.parquet")
    titles[titles["item"].isin(frame["raw"].unique())].to_parquet(folder / "items.parquet")
    return time.perf_counter() - started


def run_polars(raw: Path, folder: Path) -> float:
    """Return the seconds of the same job as one would write it in polars."""
    import polars as pl

    started = time.perf_counter()
    frame = pl.read_parquet(raw)
    titles = frame.select("item", "title").drop_nulls().group_by("item").agg(pl.col("title").min())
    frame = frame.select("user", "item", "timestamp").join(titles.select("item"), on="item", how="semi")
    before = -1
    while frame.height != before:
        before = frame.height
        for column in ("item", "user"):
            frame = frame.filter(pl.len().over(column) >= MINIMUM)
    counts = frame.group_by("item").len().sort(["len", "item"], descending=[True, False])
    numbers = counts.select("item", number=pl.int_range(1, pl.len() + 1, dtype=pl.Int32))
    table = (
        frame.join(numbers, on="item")
        .sort("user", "timestamp", "item")
        .group_by("user", maintain_order=True)
        .agg(
            pl.col("number").slice(0, pl.len() - 2).alias("training"),
            pl.col("number").get(-2).alias("validation"),
            pl.col("number").get(-1).alias("test"),
        )
        .with_columns(pl.col("user").cast(pl.String))
    )
    table.write_parquet(folder / "sequences.parquet")
    titles.join(numbers, on="item").write_parquet(folder / "items.parquet")
    return time.perf_counter() - started


def measure(contender: str, raw: Path, folder: Path) -> dict[str, float]:
    """Run one contender in its own process; return its seconds and its peak memory in MiB, with the interpreter's."""
    folder.mkdir()
    # As a module: if this file ran as a script, `import preprocessing` would find it instead of the package.
    module = [sys.executable, "-m", "benchmarks.preprocessing"]
    command = [*module, "--contender", contender, "--raw", str(raw), "--folder", str(folder)]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    measured: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    return measured


def sequences(folder: Path) -> list[list[Any]]:
    """Return the columns that a contender wrote, as plain lists ordered by user."""
    table = pq.read_table(folder / "sequences.parquet")
    order = np.argsort(np.array(table["user"].to_pylist(), dtype=np.int64))
    return [table[name].take(order).to_pylist() for name in ("user", "training", "validation", "test")]


def compare(rows: int, repeats: int, contenders: tuple[str, ...] = CONTENDERS) -> dict[str, Any]:
    """Return each contender's medians, and with all three of them whether the floor is met.

    The floor is twice the time of pandas from 1e6 rows, and from 1e7 rows its time with less than its memory.
    """
    results: dict[str, Any] = {"rows": rows, "repeats": repeats}
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "raw.parquet"
        generate(rows, raw)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
        for repeat in range(repeats):
            for name in contenders:
                runs[name].append(measure(name, raw, Path(scratch) / f"{name}-{repeat}"))
        # Item numbers and order must agree, not merely the counts.
        if len(contenders) > 1:
            written = [sequences(Path(scratch) / f"{name}-0") for name in contenders]
            if not all(other == written[0] for other in written[1:]):
                raise SystemExit("the contenders wrote different sequences")
    for name in contenders:
        results[name] = {
            key: round(statistics.median(run[key] for run in runs[name]), 2) for key in ("seconds", "peak_mib")
        }
    if contenders != CONTENDERS:
        return results
    ours, pandas = results["llamarec"], results["pandas"]
    results["times_pandas"] = round(ours["seconds"] / pandas["seconds"], 2)
    results["times_polars"] = round(ours["seconds"] / results["polars"]["seconds"], 2)
    large = rows >= 10_000_000
    if rows >= 1_000_000:  # smaller inputs have no floor
        results["floor_met"] = bool(
            results["times_pandas"] <= (1 if large else 2) and (not large or ours["peak_mib"] < pandas["peak_mib"])
        )
    return results


def main() -> None:
    """Parse the command line and print the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="Number of interactions to generate.")
    parser.add_argument("--repeats", type=int, default=3, help="Runs of each contender, in turn; medians are printed.")
    parser.add_argument("--only", choices=CONTENDERS, help="Measure this one only, if the others need too much memory.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    for name in ("--contender", "--raw", "--folder"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.contender:
        runs = {"llamarec": run_llamarec, "pandas": run_pandas, "polars": run_polars}
        seconds = runs[given.contender](Path(given.raw), Path(given.folder))
        from benchmarks.memory import peak_memory

        print(json.dumps({"seconds": seconds, "peak_mib": peak_memory()}))
        return
    results = compare(given.rows, given.repeats, (given.only,) if given.only else CONTENDERS)
    if given.json:
        print(json.dumps(results, indent=1))
        return
    for name in [name for name in CONTENDERS if name in results]:
        print(f"{name:9} {results[name]['seconds']:8.2f} s {results[name]['peak_mib']:8.0f} MiB")
    if given.only:
        return
    ratios = f"{results['times_pandas']}x pandas' time, {results['times_polars']}x polars'"
    print(f"{ratios}; floor met: {results.get('floor_met', 'none set')}")


if __name__ == "__main__":
    main()
