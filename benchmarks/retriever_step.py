"""Measures one optimisation step of LRURec, compared with its authors' implementation on the same batches.

    python -m benchmarks.retriever_step --json

Both implementations run in one process, in turn; figures are medians. Lengths are distributed as in real windows:
ml-latest-small has batches of 16 x 200 with 3,650 items, Beauty has batches of 64 x 50 with 12,086 items, where most of
a window is padding.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.authors_lrurec import authors_loss
from benchmarks.memory import peak_memory
from models.retriever.architectures.lrurec import LRURec
from models.retriever.batches import inputs_and_targets
from models.retriever.fitting.loop import make_optimizer
from models.retriever.fitting.objectives import next_item_loss
from models.retriever.options import RetrieverTraining

SHAPES = {
    # batch size, window length, items, mean items of a window before it is cut, minimum speed-up
    "ml-latest-small": (16, 200, 3_650, 150, 2.0),
    "beauty": (64, 50, 12_086, 7, 4.0),
}


def batch(name: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets [batch, length] of random items.

    The number of items of a window is geometric with the data set's mean, cut at the window's length.
    """
    size, length, items, mean, _ = SHAPES[name]
    rng = np.random.default_rng(seed)
    lengths = np.clip(3 + rng.geometric(1 / (mean - 2), size), 3, length)
    windows = [rng.integers(1, items + 1, count).astype(np.int32) for count in lengths]
    inputs, targets = inputs_and_targets(windows, length)
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def mean_loss(model: LRURec, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the loss whose gradient the training loop takes."""
    total, count = next_item_loss(model, inputs, targets)
    return total / count


def measure(name: str, steps: int, contenders: tuple[str, ...] = ("authors", "ours")) -> dict[str, list[float]]:
    """Return the seconds of every step of every contender; the contenders take turns."""
    options = RetrieverTraining()
    seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
    losses = {"authors": authors_loss, "ours": mean_loss}
    models, optimizers = {}, {}
    for contender in contenders:
        torch.manual_seed(0)
        models[contender] = LRURec(SHAPES[name][2], options.width, options.blocks, options.dropout)
        optimizers[contender] = make_optimizer(models[contender], options)
    for step in range(steps + 2):
        inputs, targets = batch(name, step)
        for contender in contenders:
            started = time.perf_counter()
            optimizers[contender].zero_grad(set_to_none=True)
            losses[contender](models[contender].train(), inputs, targets).backward()
            torch.nn.utils.clip_grad_norm_(models[contender].parameters(), options.clip)
            optimizers[contender].step()
            if step >= 2:  # after two steps of warm-up
                seconds[contender].append(time.perf_counter() - started)
    return seconds


def peak_mib(name: str, contender: str) -> float:
    """Return the peak memory, in MiB, of a process that takes five steps of one contender, with the interpreter's."""
    command = [sys.executable, "-m", "benchmarks.retriever_step", "--peak", f"{name}:{contender}"]
    ended = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    return float(ended.stdout)


def main() -> None:
    """Parse the command line and print the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15, help="Steps of each, in turn; medians are printed.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        name, contender = given.peak.split(":")
        measure(name, 3, (contender,))
        print(peak_memory())
        return
    results = {}
    for name, (size, length, items, _, floor) in SHAPES.items():
        medians = {key: statistics.median(values) for key, values in measure(name, given.steps).items()}
        ratio = medians["authors"] / medians["ours"]
        results[name] = {
            "batch": f"{size} x {length}, {items} items",
            "authors_seconds": round(medians["authors"], 4),
            "ours_seconds": round(medians["ours"], 4),
            "times_faster": round(ratio, 2),
            "authors_peak_mib": round(peak_mib(name, "authors")),
            "ours_peak_mib": round(peak_mib(name, "ours")),
            "floor_met": ratio >= floor,
        }
    if given.json:
        print(json.dumps(results, indent=1))
        return
    for name, row in results.items():
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
