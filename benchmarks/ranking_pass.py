"""Measures the seconds of one ranking request: the authors' implementation, every runtime, and the hardware's limit.

    python -m benchmarks.ranking_pass --json
    python -m benchmarks.ranking_pass --runs 2 --batches 1 --busy    # a minute or two on a slow machine with other work

The authors' implementation is fp32 with the logits of the whole vocabulary at every position; a batch is padded to its
longest prompt. All implementations run in one process, in turn, on prompts of 20 + 20 MovieLens titles; figures are
medians. The hardware's limit of a request is the number of its floating-point operations divided by the best rate of
large matrix products measured here, in bf16 if the processor has it. The rate of PyTorch's products of the layers' own
shapes is measured as well, because on some processors it is far below the best.
"""

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

from benchmarks.clock import add_clock, add_device, chosen_clock
from benchmarks.movie_prompts import embedded_base, letters, movie_prompts
from models.ranker.fitting.qlora import load_base
from models.ranker.inference.runtimes import choose_runtime, load_scorer
from models.ranker.inference.scorer import Dtype, Runtime, RuntimeName, Scorer
from models.ranker.options import PRESETS
from models.ranker.precision import DTYPES, has_native_bf16
from models.ranker.prompt import Prompt

FLOORS = {1: 2.5, 8: 3.2}
"""Minimum speed-up over the authors' implementation, by batch size."""
DEPTH = PRESETS["smollm2-135m"]["depth"]
LOWER = f"lines of the lower {DEPTH}"
"""Name of the implementation of a different ranker; no floor applies to it."""
SETTLED_ON = 4
"""Number of prompts on which a scorer chooses its passes, as many as a ranker has probes."""
SHARE = 0.70
"""Minimum share of the best rate of matrix products."""
Way = Callable[[list[Prompt]], Any]
Clock = Callable[[], float]


def authors_way(device: str) -> Way:
    """Return the authors' implementation: full logits of a padded batch in fp32."""
    model = LlamaForCausalLM.from_pretrained(str(embedded_base()), dtype=torch.float32).eval().to(device)

    @torch.inference_mode()
    def score(prompts: list[Prompt]) -> Any:
        rows = [prompt.tokens for prompt in prompts]
        length = max(map(len, rows))
        tokens = torch.tensor([[0] * (length - len(row)) + row for row in rows])  # padded on the left, as theirs
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        given = {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}
        return model(**given, use_cache=False).logits[:, -1, letters()]

    return score


def ways(threads: int, device: str) -> dict[str, Way]:
    """Return every runtime of this machine by name, and the authors' implementation."""
    runtimes: tuple[RuntimeName, ...] = ("torch", "openvino") if device == "cpu" else ("torch",)
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16") if has_native_bf16(device) else ("float32",)
    if device != "cpu":
        dtypes = (*dtypes, "float16")
    found = {"authors": authors_way(device)}
    for runtime in runtimes:
        for dtype in dtypes:
            scorer = load_scorer(embedded_base(), Runtime(runtime=runtime, dtype=dtype, threads=threads, device=device))
            scorer.settle(movie_prompts(SETTLED_ON))
            found[f"{runtime} {dtype}"] = partial(by_letters, scorer)
    return found


def lower_lines(threads: int, folder: Path, device: str) -> Way:
    """Return what the preset `smollm2-135m` serves: lines read from the lower layers, in the fastest runtime."""
    base = load_base(embedded_base(), quantisation="none", dtype=torch.float32, device="cpu", depth=DEPTH)
    base.save_pretrained(folder)
    scorer = load_scorer(folder, replace(choose_runtime(device), threads=threads))
    scorer.settle(movie_prompts(SETTLED_ON))
    direction = np.ones(base.config.hidden_size, np.float32)
    return lambda prompts: [scorer.score_lines(prompt.tokens, prompt.line_ends, direction) for prompt in prompts]


def by_letters(scorer: Scorer, prompts: list[Prompt]) -> Any:
    """Return the logits of the letters."""
    return scorer.score([prompt.tokens for prompt in prompts], letters())


def product_seconds(
    rows: int, inner: int, columns: int, dtype: torch.dtype, clock: Clock, device: str, repeats: int = 7
) -> float:
    """Return the seconds of the fastest of several products of a [rows, inner] and an [inner, columns] matrix."""
    a, b = torch.randn(rows, inner).to(device, dtype), torch.randn(inner, columns).to(device, dtype)
    seconds = []
    for _ in range(repeats):
        started = clock()
        torch.mm(a, b)
        seconds.append(clock() - started)
    return min(seconds)


def peak_rate(dtype: torch.dtype, clock: Clock, device: str) -> float:
    """Return the floating-point operations per second of the fastest of several large matrix products."""
    shapes = ((2048, 2048, 2048), (640, 576, 1536), (4096, 1024, 1024))
    return max(2 * math.prod(shape) / product_seconds(*shape, dtype, clock, device) for shape in shapes)


def weight_shapes() -> list[tuple[int, int]]:
    """Return the input and output width of each matrix of a layer."""
    config = json.loads((embedded_base() / "config.json").read_text(encoding="utf-8"))
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    return [*[(hidden, hidden)] * 2, *[(hidden, keys)] * 2, *[(hidden, inner)] * 2, (inner, hidden)]


def own_rate(prompt: Sequence[int], dtype: torch.dtype, clock: Clock, device: str) -> float:
    """Return the floating-point operations per second of a layer's products, computed one after the other."""
    shapes = [(len(prompt), *shape) for shape in weight_shapes()]
    seconds = {shape: product_seconds(*shape, dtype, clock, device) for shape in set(shapes)}
    return sum(2 * math.prod(shape) for shape in shapes) / sum(seconds[shape] for shape in shapes)


def operations(prompt: Sequence[int]) -> float:
    """Return the floating-point operations of a pass over the layers; causal attention counts half."""
    config = json.loads((embedded_base() / "config.json").read_text(encoding="utf-8"))
    length = len(prompt)
    weights = sum(map(math.prod, weight_shapes()))
    return float(config["num_hidden_layers"] * (2 * weights * length + 2 * config["hidden_size"] * length * length))


def measure(runs: int, batches: Sequence[int], threads: int, clock: Clock, device: str) -> dict[str, Any]:
    """Return the medians of interleaved runs for each batch size."""
    contenders = ways(threads, device)
    with tempfile.TemporaryDirectory() as folder:
        contenders[LOWER] = lower_lines(threads, Path(folder), device)
    best_dtype = "bfloat16" if has_native_bf16(device) else "float32"
    rate = peak_rate(DTYPES[best_dtype], clock, device)
    result: dict[str, Any] = {
        "threads": threads,
        "runs": runs,
        "device": device,
        "bf16": has_native_bf16(device),
        "peak_gflops": {best_dtype: round(rate / 1e9, 1)},
    }
    for batch in batches:
        prompts = movie_prompts(batch)
        tokens = [prompt.tokens for prompt in prompts]
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for way in contenders.values():
            way(prompts[:1])
        for _ in range(runs):
            for name, way in contenders.items():
                started = clock()
                way(prompts)
                seconds[name].append((clock() - started) / batch)
        rate = max(rate, peak_rate(DTYPES[best_dtype], clock, device))
        own = own_rate(tokens[0], DTYPES[best_dtype], clock, device)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        floor = statistics.mean(map(operations, tokens)) / rate
        best = min(medians.keys() - {LOWER}, key=lambda name: medians[name])
        ratio, share = medians["authors"] / medians[best], floor / medians[best]
        result[f"batch_{batch}"] = {
            "tokens": [len(row) for row in tokens],
            "seconds_a_request": {name: round(value, 3) for name, value in medians.items()},
            "seconds_at_peak": round(floor, 3),
            "best": best,
            "times_authors": round(ratio, 2),
            "share_of_peak": round(share, 2),
            "own_shapes_share_of_peak": round(own / rate, 2),
            "lines_times_authors": round(medians["authors"] / medians[LOWER], 2),
            "floor_met": ratio >= FLOORS.get(batch, 1.0) and share >= SHARE,
        }
    result["peak_gflops"] = {best_dtype: round(rate / 1e9, 1)}
    result["floor_met"] = all(result[f"batch_{batch}"]["floor_met"] for batch in batches)
    return result


def main() -> None:
    """Parse the command line and print the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="Interleaved runs; their median is printed.")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="Batch sizes: requests ranked at once.")
    add_clock(parser)
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    given = parser.parse_args()
    clock = chosen_clock(given)
    measured = measure(given.runs, given.batches, given.threads, clock, given.device)
    result = {**measured, "processor_seconds": given.busy}
    if given.json:
        print(json.dumps(result, indent=1))
        return
    for batch in given.batches:
        row = result[f"batch_{batch}"]
        for name, value in row["seconds_a_request"].items():
            print(f"batch {batch}  {name:20} {value:8.3f} s per request")
        print(f"batch {batch}  best: speed-up {row['times_authors']}x, {row['share_of_peak']} of the peak rate")
        print(f"batch {batch}  PyTorch, products of the layers' shapes: {row['own_shapes_share_of_peak']} of it")
        print(f"batch {batch}  {LOWER}: speed-up {row['lines_times_authors']}x")
    print(f"floor met: {result['floor_met']}")


if __name__ == "__main__":
    main()
