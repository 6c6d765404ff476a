"""Compares ranking 20 candidates with the verbalizer and by generating their titles in order (the paper's Figure 3).

    python -m benchmarks.verbalizer_vs_generation --json --plot docs/results/verbalizer_vs_generation.png

Both read the same prompt with the same model in the same precision. The verbalizer needs one pass and 20 logits.
Generation decodes greedily, with a key-value cache, as many tokens as the 20 titles and their line breaks have: the
paper's limit, and what a complete list takes. Titles are random words cut to the given number of tokens.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from benchmarks.clock import add_clock, add_device, chosen_clock
from benchmarks.movie_prompts import embedded_base, movie_titles
from models.ranker.inference.scorer import Dtype, Runtime
from models.ranker.inference.torch_scorer import TorchScorer
from models.ranker.precision import DTYPES, has_native_bf16
from models.ranker.prompt import RESPONSE, TOKENIZER_FILE, PromptBuilder, PromptSettings, letter_ids
from preprocessing.catalogue import Catalogue

ITEMS = 40
"""Titles in a prompt: 20 in the history and 20 candidates."""


def titles_of(words: Sequence[str], tokens: int, encode: Tokenizer, seed: int = 0) -> list[str]:
    """Return 40 titles of exactly ``tokens`` tokens each, made of random words."""
    rng = np.random.default_rng(seed)
    titles: list[str] = []
    while len(titles) < ITEMS:
        text = " ".join(rng.choice(words, tokens))
        offsets = encode.encode(text).offsets
        title = text[: offsets[tokens - 1][1]]
        if len(encode.encode(title).ids) == tokens:
            titles.append(title)
    return titles


def measure(
    base: Path, runtime: Runtime, words: Sequence[str], lengths: Sequence[int], runs: int, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """Return a row for each average title length, with the median seconds of both over ``runs``.

    Args:
        base: folder of the language model and its tokenizer.
        runtime: how both run; PyTorch on any device.
        words: words of the titles.
        lengths: title lengths in tokens.
        runs: number of runs.
        clock: returns the time in seconds.
    """
    encode = Tokenizer.from_file(str(base / TOKENIZER_FILE))
    letters = letter_ids(encode, RESPONSE)
    scorer = TorchScorer(base, runtime)
    model = LlamaForCausalLM.from_pretrained(str(base), dtype=DTYPES[runtime.dtype]).eval().to(runtime.device)
    scorer.score([[1, 2, 3]], letters)
    rows = []
    for length in lengths:
        catalogue = Catalogue([b""] * ITEMS, titles_of(words, length, encode), [])
        prompt = PromptBuilder(catalogue, encode, PromptSettings()).build(range(1, 21), range(21, 41)).tokens
        tokens = torch.tensor([prompt], device=runtime.device)
        wanted = 20 * (length + 1)  # a line break after each title
        seconds: dict[str, list[float]] = {"verbalizer": [], "generation": []}
        for _ in range(runs):
            started = clock()
            scorer.score([prompt], letters)
            seconds["verbalizer"].append(clock() - started)
            started = clock()
            model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=wanted,
                min_new_tokens=wanted,
                do_sample=False,
                pad_token_id=2,
            ).cpu()
            seconds["generation"].append(clock() - started)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        rows.append(
            {
                "title_tokens": length,
                "prompt_tokens": len(prompt),
                "generated_tokens": wanted,
                **{f"{name}_seconds": round(value, 3) for name, value in medians.items()},
                "times_faster": round(medians["generation"] / medians["verbalizer"], 1),
            }
        )
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the seconds of both against the title length, as in the paper's figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    lengths = [row["title_tokens"] for row in rows]
    for name in ("generation", "verbalizer"):
        axes.plot(lengths, [row[f"{name}_seconds"] for row in rows], marker="o", label=name)
    axes.set(xlabel="average title length [tokens]", ylabel="seconds to rank 20 candidates", xticks=lengths)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main() -> None:
    """Parse the command line and print the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[5, 10, 15, 20], help="Average title lengths, in tokens."
    )
    parser.add_argument("--runs", type=int, default=3, help="Runs; their median is printed.")
    add_clock(parser)
    add_device(parser)
    parser.add_argument("--plot", type=Path, help="PNG file to write.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    given = parser.parse_args()
    clock = chosen_clock(given)
    dtype: Dtype = "bfloat16" if has_native_bf16(given.device) else "float32"
    runtime = Runtime(dtype=dtype, threads=given.threads, device=given.device)
    words = " ".join(movie_titles()).split()
    rows = measure(embedded_base(), runtime, words, given.lengths, given.runs, clock)
    if given.plot:
        plot(rows, given.plot)
    if given.json:
        print(json.dumps(rows, indent=1))
        return
    print("| title tokens | prompt tokens | verbalizer [s] | generation [s] | times faster |\n|---|---|---|---|---|")
    for row in rows:
        print("| {title_tokens} | {prompt_tokens} | {verbalizer_seconds} |".format(**row), end="")
        print(" {generation_seconds} | {times_faster} |".format(**row))


if __name__ == "__main__":
    main()
