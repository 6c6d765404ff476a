"""One request over a large catalogue beside one reading of its embeddings from memory.

    python -m benchmarks.retrieval --items 1000000 --json
    python -m benchmarks.retrieval --items 10000000 --json    # 2.6 GB of embeddings

An untrained LRURec of width 64 is exported and asked through :class:`OnnxRetriever`, as by the server: a history of
50 items, 20 more excluded, exact top 20. Requests and readings take turns; medians. The reading is the fastest of three
ways to add up the embeddings with as many threads as the retriever is served with, from the same mapped file.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.memory import peak_memory
from models.retriever.lrurec import LRURec
from models.retriever.onnx_export import export_retriever
from models.retriever.serving import MODEL, OnnxRetriever

WIDTH, LENGTH = 64, 50
FLOOR = 1.5
"""Largest allowed time of a request, in readings."""


def write(items: int, folder: Path) -> None:
    """Exports an untrained retriever."""
    torch.manual_seed(0)
    export_retriever(LRURec(items, WIDTH).eval(), LENGTH, folder)


def seconds(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each way, all of them in turn."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 2):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if turn >= 2:  # the first ones warm up
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in taken.items()}


def measure(folder: Path, items: int, rounds: int) -> dict[str, object]:
    """Times requests and readings of an exported retriever in ``folder``."""
    retriever = OnnxRetriever.load(folder)
    rng = np.random.default_rng(0)
    history, excluded = (rng.integers(1, items + 1, count).astype(np.int32) for count in (LENGTH, 20))
    # The embeddings are all but a few hundred kilobytes of the weights.
    weights = np.memmap(folder / f"{MODEL}.data", np.int64, "r", shape=items * WIDTH // 2)
    floats = weights.view(np.float32)
    ways: dict[str, Callable[[], object]] = {
        "request": lambda: retriever.candidates(history, excluded),
        "scores": lambda: retriever.scores(history),
        "add integers": lambda: np.add.reduce(weights),
        "add floats": lambda: np.add.reduce(floats),
        "largest": lambda: np.maximum.reduce(floats),
    }
    taken = seconds(ways, rounds)
    reading = min(taken[name] for name in ("add integers", "add floats", "largest"))
    return {
        "items": items,
        "embeddings_mib": round(items * WIDTH * 4 / 2**20),
        "request_ms": round(1000 * taken["request"], 2),
        "of_which_scores_ms": round(1000 * taken["scores"], 2),
        "one_reading_ms": round(1000 * reading, 2),
        "reading_gb_per_second": round(items * WIDTH * 4 / reading / 1e9, 1),
        "readings_a_request": round(taken["request"] / reading, 2),
        "peak_memory_mib": round(peak_memory()),
        "floor_met": taken["request"] <= FLOOR * reading,
    }


def main() -> None:
    """Parses the command line and prints what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=15, help="requests and readings, in turn; medians are printed")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a line")
    parser.add_argument("--folder", type=Path, help="keep the exported retriever here, or take the one that is here")
    parser.add_argument("--export", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.export:
        write(given.items, given.export)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MODEL).exists():
            # Apart, so that the memory measured is that of serving.
            command = [sys.executable, "-m", "benchmarks.retrieval", "--items", str(given.items), "--export", folder]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[1])
        result = measure(folder, given.items, given.rounds)
    print(
        json.dumps(result, indent=1) if given.json else ", ".join(f"{name} {value}" for name, value in result.items())
    )


if __name__ == "__main__":
    main()
