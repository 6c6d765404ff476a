"""Time and memory of the data stage beside the same job in plain pandas and in polars.

    python benchmarks/preprocessing.py --rows 1000000 --json

Interactions are drawn with zipf-distributed users and items and written as Parquet; the title filter, the 5-core, the
numbering, the sequences and the split are then done by `preprocess` and by the two references, each run in a process of
its own, in turn, imports aside. All three must write the same sequences, or the benchmark fails.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CONTENDERS = ("llamarec", "pandas", "polars")
ROWS_A_USER = 100
ROWS_AN_ITEM = 200
UNTITLED = 0.02
"""Share of the items without a title."""
MINIMUM = 5


def generate(rows: int, path: Path, seed: int = 0) -> None:
    """Writes interactions with zipf-distributed users and items, a million rows at a time."""
    rng = np.random.default_rng(seed)
    users, items = max(rows // ROWS_A_USER, 100), max(rows // ROWS_AN_ITEM, 100)
    untitled = rng.random(items) < UNTITLED
    schema = pa.schema({"user": pa.int64(), "item": pa.int64(), "timestamp": pa.int64(), "title": pa.string()})
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 1_000_000):
            count = min(1_000_000, rows - start)
            user, item = (zipf(rng, kinds, count) for kinds in (users, items))
            columns = {
                "user": pa.array(user),
                "item": pa.array(item),
                "timestamp": pa.array(rng.integers(1_000_000_000, 1_700_000_000, count)),
                "title": pa.array(np.where(untitled[item], None, np.char.add("title ", item.astype(str))), pa.string()),
            }
            writer.write_table(pa.table(columns, schema))


def zipf(rng: np.random.Generator, kinds: int, count: int) -> np.ndarray:
    """``count`` numbers below ``kinds``, the r-th as often as 1 / (r + 10): heavy at the head, with a long tail."""
    weights = np.cumsum(1 / (np.arange(kinds) + 10))
    return np.searchsorted(weights, rng.random(count) * weights[-1])


def run_llamarec(raw: Path, folder: Path) -> float:
    """Seconds of `llamarec preprocess`; all that it writes stays in the timed path."""
    from preprocessing import workflows  # noqa: F401 - imports are not timed
    from preprocessing.data import read_sequences
    from preprocessing.preprocess import Preprocessing, preprocess

    started = time.perf_counter()
    preprocess(Preprocessing(dataset="table", raw=raw, minimum=MINIMUM), folder)
    seconds = time.perf_counter() - started
    pq.write_table(pa.concat_tables(read_sequences(folder / "data")), folder / "sequences.parquet")
    return seconds


def run_pandas(raw: Path, folder: Path) -> float:
    """Seconds of the same job as one would write it in pandas."""
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
    """Seconds of the same job as one would write it in polars."""
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
    """Runs one contender in a process of its own: seconds, and peak memory in MiB, the interpreter's included."""
    folder.mkdir()
    # As a module: run as a script, this file would stand in for the package it measures.
    module = [sys.executable, "-m", "benchmarks.preprocessing"]
    command = [*module, "--contender", contender, "--raw", str(raw), "--folder", str(folder)]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    return json.loads(finished.stdout.splitlines()[-1])


def sequences(folder: Path) -> list[list]:
    """The columns that a contender wrote, as plain lists ordered by user."""
    table = pq.read_table(folder / "sequences.parquet")
    order = np.argsort(np.array(table["user"].to_pylist(), dtype=np.int64))
    return [table[name].take(order).to_pylist() for name in ("user", "training", "validation", "test")]


def compare(rows: int, repeats: int, contenders: tuple[str, ...] = CONTENDERS) -> dict:
    """Medians of every contender; of all three, whether the floor is met: 2x pandas' time, from 1e7 rows its own."""
    results: dict = {"rows": rows, "repeats": repeats}
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "raw.parquet"
        generate(rows, raw)
        runs: dict[str, list] = {name: [] for name in contenders}
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
    if rows >= 1_000_000:  # below, there is none
        results["floor_met"] = bool(
            results["times_pandas"] <= (1 if large else 2) and (not large or ours["peak_mib"] < pandas["peak_mib"])
        )
    return results


def main() -> None:
    """Parses the command line and prints what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="interactions to generate")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each contender, in turn; medians are printed")
    parser.add_argument("--only", choices=CONTENDERS, help="measure one alone, where the others need too much memory")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
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
