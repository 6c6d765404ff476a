"""Measures one request over a large catalogue, compared with reading its embeddings from memory once.

    python -m benchmarks.retrieval_pass --items 1000000 --json
    python -m benchmarks.retrieval_pass --items 1000000 --index --json    # also with the approximate index
    python -m benchmarks.retrieval_pass --items 10000000 --json           # 2.6 GB of embeddings
    python -m benchmarks.retrieval_pass --items 12000 --signals --json    # with and without the signals

An untrained LRURec of width 64 is exported and called through :class:`OnnxRetriever`, as in the server: a history of 50
items, 20 more excluded, exact top 20. Requests and readings take turns; figures are medians. The reading is the fastest
of three ways to reduce the embeddings to one number, in one thread like the request, from the same mapped file.

The embeddings are drawn from as many clusters as the index has lists, and each history from one cluster. The measured
recall of the index applies to such data; that of real embeddings will differ.

The signals read random statistics: 12 words of each title and 50 followers of each item. Requests with and without them
take turns; without them, a request takes the best 20 items from the same scores.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.memory import peak_memory
from export.onnx_graph import export_retriever
from models.retriever.architectures.lrurec import LRURec
from models.retriever.inference.onnx_retriever import INDEX, MODEL, SETTINGS, OnnxRetriever
from models.retriever.options import RetrieverTraining
from models.retriever.stage import RetrievalStage
from models.retriever.trained import TrainedModel, TrainedRetriever
from models.signals.graph import ItemGraph
from models.signals.likeness import TitleLikeness
from models.signals.signals import RETRIEVERS, SIGNALS, ItemStatistics, Signals
from models.sparse import SparseRows

WIDTH, LENGTH = 64, 50
FLOOR = 1.5
"""Most readings that a request may take."""


WORDS, VOCABULARY, FOLLOWERS, NEIGHBOURS = 12, 30_000, 50, 150
"""Words of a title, words of all titles, followers of an item, and items near it in the random statistics."""


def random_rows(rows: int, columns: int, count: int, rng: np.random.Generator) -> SparseRows:
    """Return rows with at most ``count`` entries in random columns, each row of length 1 and the first one empty."""
    found = np.sort(rng.integers(0, columns, (rows, count), np.int32), axis=1)
    kept = np.diff(found, axis=1, prepend=-1) > 0  # each column once
    kept[0] = False
    offsets = np.concatenate(([0], np.cumsum(kept.sum(axis=1))))
    values = np.repeat(1 / np.sqrt(np.maximum(kept.sum(axis=1), 1)), kept.sum(axis=1))
    return SparseRows(offsets, found[kept], values.astype(np.float32))


def random_signals(items: int) -> Signals:
    """Return signals over random statistics, all with weight 1."""
    rng = np.random.default_rng(2)
    statistics = ItemStatistics(
        np.log1p(rng.integers(5, 500, items + 1)).astype(np.float32),
        TitleLikeness(random_rows(items + 1, VOCABULARY, WORDS, rng)),
        ItemGraph(random_rows(items + 1, items, FOLLOWERS, rng)),
        ItemGraph(random_rows(items + 1, items, NEIGHBOURS, rng)),
    )
    return Signals(statistics, dict.fromkeys((RETRIEVERS[0], *SIGNALS), 1.0), pool=200)


def write(items: int, folder: Path, index: bool, signals: bool) -> None:
    """Export an untrained retriever to ``folder``."""
    torch.manual_seed(0)
    model, rng = LRURec(items, WIDTH).eval(), np.random.default_rng(0)
    clusters = math.isqrt(items)
    centres = rng.standard_normal((clusters, WIDTH), dtype=np.float32)
    embeddings = model.embedding.weight.detach().numpy()
    for start in range(1, items + 1, clusters):  # item i belongs to cluster (i - 1) % clusters
        some = embeddings[start : start + clusters]
        some[:] = 0.02 * (centres[: len(some)] + 0.5 * rng.standard_normal(some.shape, dtype=np.float32))
    trained = TrainedModel(model, RetrieverTraining(max_length=LENGTH), items)
    stage = RetrievalStage(random_signals(items) if signals else None)
    export_retriever(TrainedRetriever([trained], stage), folder, index=index)


def histories(items: int, count: int) -> list[NDArray[np.int32]]:
    """Return ``count`` histories, each with items of one cluster."""
    rng, clusters = np.random.default_rng(1), math.isqrt(items)
    whole = items // clusters
    return [
        (rng.integers(0, whole, LENGTH) * clusters + rng.integers(0, clusters) + 1).astype(np.int32)
        for _ in range(count)
    ]


def load(folder: Path, index: bool) -> OnnxRetriever:
    """Open the exported retriever, with or without its index."""
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    (folder / SETTINGS).write_text(json.dumps({**settings, "index": index}), encoding="utf-8")
    return OnnxRetriever.load(folder)


def seconds(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each way; the ways take turns."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 2):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if turn >= 2:  # after two rounds of warm-up
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in taken.items()}


def measure(folder: Path, items: int, rounds: int) -> dict[str, object]:
    """Return the times of requests to the exported retriever in ``folder``, and of readings of its embeddings."""
    retriever = load(folder, index=False)
    plain = replace(retriever, stage=RetrievalStage())
    (history,) = histories(items, 1)
    excluded = np.arange(1, 21, dtype=np.int32)
    # The file holds little else: all but a few hundred kilobytes are embeddings.
    weights = np.memmap(folder / f"{MODEL}.data", np.int64, "r", shape=items * WIDTH // 2)
    floats = weights.view(np.float32)
    ways: dict[str, Callable[[], object]] = {
        "request": lambda: plain.candidates(history, excluded),
        "request with signals": lambda: retriever.candidates(history, excluded),
        "scores": lambda: retriever.scores(history),
        "add integers": lambda: np.add.reduce(weights),
        "add floats": lambda: np.add.reduce(floats),
        "largest": lambda: np.maximum.reduce(floats),
    }
    taken = seconds(ways, rounds)
    more = taken["request with signals"] - taken["request"]
    signals = {"signals_ms": round(1000 * more, 2)} if retriever.stage.signals is not None else {}
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
        **signals,
    }


def measure_index(folder: Path, items: int, rounds: int) -> dict[str, object]:
    """Return recall and speed of the approximate index, compared with the exact search."""
    exact, approximate = load(folder, index=False), load(folder, index=True)
    excluded = np.arange(1, 21, dtype=np.int32)
    asked = histories(items, 50)
    found = []
    for history in asked:
        expected, listed = (way.candidates(history, excluded).items for way in (exact, approximate))
        found.append(len(np.intersect1d(expected, listed)) / len(expected))

    def ask(way: OnnxRetriever) -> None:
        for history in asked[:5]:
            way.candidates(history, excluded)

    taken = seconds({"exact": lambda: ask(exact), "approximate": lambda: ask(approximate)}, rounds)
    return {
        "recall@20": round(statistics.mean(found), 4),
        "request_ms": round(200 * taken["approximate"], 2),
        "times_faster": round(taken["exact"] / taken["approximate"], 1),
        "file_mib": round((folder / INDEX).stat().st_size / 2**20),
    }


def main() -> None:
    """Parse the command line and print the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000, help="Number of items.")
    parser.add_argument("--rounds", type=int, default=15, help="Requests and readings, in turn; medians are printed.")
    parser.add_argument("--index", action="store_true", help="Measure the approximate index as well.")
    parser.add_argument("--signals", action="store_true", help="Measure requests with signals as well.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a line.")
    parser.add_argument("--folder", type=Path, help="Keep the exported retriever here, or use the one that is here.")
    parser.add_argument("--export", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.export:
        write(given.items, given.export, given.index, given.signals)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / (INDEX if given.index else MODEL)).exists():
            # In another process, so that the peak memory is that of serving only.
            command = [
                sys.executable,
                "-m",
                "benchmarks.retrieval_pass",
                "--items",
                str(given.items),
                "--export",
                folder,
            ]
            command += [f"--{name}" for name in ("index", "signals") if getattr(given, name)]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[1])
        result = measure(folder, given.items, given.rounds)
        if given.index:
            result["index"] = measure_index(folder, given.items, given.rounds)
    print(
        json.dumps(result, indent=1) if given.json else ", ".join(f"{name} {value}" for name, value in result.items())
    )


if __name__ == "__main__":
    main()
