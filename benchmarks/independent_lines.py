"""Measures independent lines: 20 candidates beside ordered lines, more candidates, and histories that were kept.

    python -m benchmarks.independent_lines --runs 5
    python -m benchmarks.independent_lines --busy --runtime openvino    # one thread of a machine with other work

The model is what the preset `smollm2-135m` serves: the lower layers of the embedded base, with histories of 10 items
and titles of 12 tokens. All rows are measured in turn, on the same histories; figures are medians of a request.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch

from benchmarks.clock import add_clock, add_device, chosen_clock
from benchmarks.movie_prompts import embedded_base, movie_prompts
from models.ranker.fitting.qlora import load_base
from models.ranker.inference.prefixes import PrefixCache
from models.ranker.inference.runtimes import choose_runtime, load_scorer
from models.ranker.inference.scorer import Dtype, Runtime, RuntimeName, Scorer, SlabScorer
from models.ranker.inference.slab_check import settle_slabs
from models.ranker.options import PRESETS
from models.ranker.prompt import MOST_CANDIDATES, Prompt, PromptSettings

PRESET = PRESETS["smollm2-135m"]
LIMITS = {"max_history": PRESET["max_history"], "title_tokens": PRESET["title_tokens"]}
COUNTS = (20, 50, 100, MOST_CANDIDATES)
CACHE_BYTES = 1 << 30


class Row(NamedTuple):
    """What is measured."""

    prompts: Sequence[Prompt]
    """One for each history."""
    rank: Callable[[Prompt], Any]
    kept: bool = False
    """Whether the history was asked for before."""


def rows_of(scorer: Scorer, counts: Sequence[int], histories: int) -> dict[str, Row]:
    """Return every row by name; the first is that of ordered lines."""
    direction = np.ones(len(scorer.rows([0])[0]), np.float32)

    def prompts(candidates: int, settings: PromptSettings) -> list[Prompt]:
        return [movie_prompts(1, 1, seed, settings, candidates)[0] for seed in range(histories)]

    def rank_ordered(prompt: Prompt) -> Any:
        return scorer.score_lines(prompt.tokens, prompt.line_ends, direction)

    rows = {"ordered lines, 20 candidates": Row(prompts(20, PromptSettings(**LIMITS)), rank_ordered)}
    rank = partial(scorer.score_independent, direction=direction)
    for count in counts:
        given = prompts(count, PromptSettings(**LIMITS, candidates=MOST_CANDIDATES, independent=True))
        rows[f"independent lines, {count} candidates"] = Row(given, rank)
        rows[f"independent lines, {count} candidates, history kept"] = Row(given, rank, kept=True)
    return rows


def load(runtime: Runtime) -> SlabScorer:
    """Return the embedded base's lower layers."""
    with tempfile.TemporaryDirectory() as folder:
        depth = int(PRESET["depth"])
        base = load_base(embedded_base(), quantisation="none", dtype=torch.float32, device="cpu", depth=depth)
        base.save_pretrained(folder)
        scorer = load_scorer(Path(folder), replace(runtime, forward="transformers"))
    assert isinstance(scorer, SlabScorer)  # the packed forward keeps no prefixes
    return scorer


def measure(
    scorer: SlabScorer, counts: Sequence[int], histories: int, runs: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """Return the median seconds of a request for each row, and the mean tokens of its prompts.

    Args:
        scorer: the language model.
        counts: numbers of candidates.
        histories: number of histories.
        runs: number of rounds over all rows and histories.
        clock: returns the time in seconds.
    """
    rows = rows_of(scorer, counts, histories)
    first = rows[f"independent lines, {counts[0]} candidates"]
    settle_slabs(scorer, first.prompts[0])
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(runs + 1):
        for history in range(histories):
            for name, row in rows.items():
                prompt = row.prompts[history]
                scorer.prefixes = PrefixCache(CACHE_BYTES)
                if row.kept:
                    scorer.prefixes.get(prompt.tokens[: prompt.prefix], scorer.prefix)
                started = clock()
                row.rank(prompt)
                if number:  # the first round warms up
                    seconds[name].append(clock() - started)
    return {
        "slab_rows": list(scorer.slab_rows),
        "tokens": {name: statistics.mean(len(prompt.tokens) for prompt in row.prompts) for name, row in rows.items()},
        "prefix_tokens": statistics.mean(
            prompt.prefix for prompt in rows[f"independent lines, {counts[0]} candidates"].prompts
        ),
        "seconds": {name: round(statistics.median(values), 4) for name, values in seconds.items()},
    }


def main() -> None:
    """Parse the command line and print the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="Rounds; the median is printed.")
    parser.add_argument("--histories", type=int, default=3, help="Number of histories.")
    parser.add_argument("--candidates", type=int, nargs="+", default=COUNTS, help="Numbers of candidates.")
    parser.add_argument("--runtime", choices=get_args(RuntimeName), help="Default: that of an export on this machine.")
    parser.add_argument("--dtype", choices=get_args(Dtype), help="Default: that of an export on this machine.")
    add_clock(parser)
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    given = parser.parse_args()
    clock = chosen_clock(given)
    chosen = {"runtime": given.runtime, "dtype": given.dtype, "threads": given.threads}
    runtime = replace(choose_runtime(given.device), **{name: value for name, value in chosen.items() if value})
    result = {**asdict(runtime), **measure(load(runtime), given.candidates, given.histories, given.runs, clock)}
    if given.json:
        print(json.dumps({**result, "processor_seconds": given.busy}, indent=1))
        return
    print(f"{runtime.runtime} {runtime.dtype} on {runtime.device}, {runtime.threads} threads")
    print(f"slabs of {', '.join(map(str, result['slab_rows'])) or 'one line'}")
    first = next(iter(result["seconds"].values()))
    for name, value in result["seconds"].items():
        print(f"{name:50} {result['tokens'][name]:6.0f} tokens {value:8.3f} s  {first / value:5.2f}x")


if __name__ == "__main__":
    main()
