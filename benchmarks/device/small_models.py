"""Measures ranking and training of small models: SmolLM2 as a whole and its lower layers, and a 1B shape."""

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from benchmarks.device.section import Section, section_of
from benchmarks.device.shapes import LLAMA_32_1B, SMOLLM2, TINY, Shape, write_model
from benchmarks.device.timing import matmul_rate, median_seconds, timed
from benchmarks.device.training import train_steps
from models.ranker.inference.scorer import Dtype, Runtime
from models.ranker.inference.slab_check import settle_slabs
from models.ranker.inference.torch_scorer import TorchScorer
from models.ranker.options import PRESETS, RankerTraining
from models.ranker.precision import DTYPES
from models.ranker.prompt import (
    MOST_CANDIDATES,
    RESPONSE,
    TOKENIZER_FILE,
    Prompt,
    PromptBuilder,
    PromptSettings,
    letter_ids,
)
from preprocessing.data import Data

PROMPTS, ROUNDS = 32, 3
PRESET = PRESETS["smollm2-135m"]
BOTH = (Shape("SmolLM2 135M, lower layers", 576, 1536, int(PRESET["depth"]), 9, 3, tied=True), SMOLLM2, LLAMA_32_1B)


def measure(section: Section) -> None:
    """Record the seconds a prompt of every shape and precision, and the seconds of a training step."""
    shapes = (TINY,) if section.dry_run else BOTH
    precisions: Sequence[Dtype] = ("float32",) if section.dry_run else ("float16", "bfloat16", "float32")
    data, base = section.data(), section.embedded_base()
    for shape in shapes:
        folder = write_model(shape, base, section.work / shape.name.replace(" ", "-"), section.device)
        prompts = prompts_of(data, folder, 4 if section.dry_run else PROMPTS)
        found: dict[str, Any] = {
            "tokens": statistics.mean(len(prompt.tokens) for prompt in prompts),
            "layers": shape.layers,
        }
        for dtype in precisions:
            found[dtype] = ranking(shape, folder, dtype, section, prompts)
            found[f"independent lines, {dtype}"] = independent_lines(data, folder, dtype, section)
            section.record(shape.name, found)
        for micro_batch in (4, 16):
            options = training_options(section, micro_batch)
            found[f"QLoRA, micro-batch {micro_batch}"] = train_steps(section, folder, options)[1]
            section.record(shape.name, found)


def prompts_of(data: Data, folder: Path, count: int) -> list[Prompt]:
    """Return prompts of 20 history items and 20 random candidates, the histories being those of the first users."""
    builder = PromptBuilder(data.catalogue, Tokenizer.from_file(str(folder / TOKENIZER_FILE)), PromptSettings())
    draw = np.random.default_rng(0)
    return [
        builder.build(history, draw.choice(data.catalogue.trained, 20, replace=False).tolist())
        for history in data.test_histories()[:count]
    ]


def ranking(shape: Shape, folder: Path, dtype: Dtype, section: Section, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Return the median seconds of a pass over one prompt, its share of the device's rate, and whether it repeats."""
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    letters = letter_ids(tokenizer, RESPONSE)
    scorer = TorchScorer(folder, Runtime(dtype=dtype, threads=torch.get_num_threads(), device=section.device))
    score = partial(scorer.score, label_ids=letters)
    first = [score([prompt.tokens]) for prompt in prompts]
    seconds, same = [], True
    for _ in range(ROUNDS):
        for prompt, expected in zip(prompts, first, strict=True):
            scores, duration = timed(partial(score, [prompt.tokens]), section.device)
            seconds.append(duration)
            same &= bool((scores == expected).all())
    rate = matmul_rate(section.device, DTYPES[dtype], 256 if section.dry_run else 8192)
    mean = statistics.mean(shape.operations(len(prompt.tokens)) for prompt in prompts)
    median = statistics.median(seconds)
    return {
        "seconds": median,
        "p90": float(np.quantile(seconds, 0.9)),
        "prompts_a_second": 1 / median,
        "matmul_flops": rate,
        "share_of_matmul": mean / median / rate,
        "bit_equal_when_repeated": same,
    }


def independent_lines(data: Data, folder: Path, dtype: Dtype, section: Section) -> dict[str, Any]:
    """Return the median seconds to rank 20 and 200 independent lines, and the slabs at which their bits repeat.

    Without any such slabs each line is computed by itself.
    """
    settings = PromptSettings(candidates=MOST_CANDIDATES, independent=True)
    builder = PromptBuilder(data.catalogue, Tokenizer.from_file(str(folder / TOKENIZER_FILE)), settings)
    items = np.random.default_rng(0).choice(data.catalogue.trained, MOST_CANDIDATES, replace=False) + 1
    prompts = {
        count: builder.build(data.test_histories()[0], items[:count].tolist()) for count in (20, MOST_CANDIDATES)
    }
    scorer = TorchScorer(folder, Runtime(dtype=dtype, threads=torch.get_num_threads(), device=section.device))
    settle_slabs(scorer, prompts[20])
    seconds = {
        str(count): median_seconds(partial(scorer.independent_states, prompt), section.device, ROUNDS)
        for count, prompt in prompts.items()
    }
    return {"slab_rows": list(scorer.slab_rows), "seconds": seconds}


def training_options(section: Section, micro_batch: int) -> RankerTraining:
    """Return the paper's options with this micro-batch."""
    batch = 4 if section.dry_run else 16
    return RankerTraining(batch_size=batch, micro_batch_size=min(batch, micro_batch), device=section.device)


if __name__ == "__main__":
    measure(section_of(__doc__)[0])
