"""Measures the paper's base at its real size: a model of the shape of Llama 2 7B with seeded random weights.

QLoRA steps with the paper's options, the merge, the load, ranking one prompt, and ranking by the verbalizer against
generating the titles (the paper's Figure 3).
"""

import shutil
import statistics
import time
from pathlib import Path

import torch

from benchmarks.device.section import Section, section_of
from benchmarks.device.shapes import LLAMA_2_7B, TINY, write_model
from benchmarks.device.small_models import prompts_of, ranking
from benchmarks.device.timing import peak_bytes, reset_peak, seconds_of
from benchmarks.device.training import train_steps
from benchmarks.verbalizer_vs_generation import measure as compare_with_generation
from models.ranker.fitting.merge import save_merged
from models.ranker.inference.scorer import Dtype, Runtime
from models.ranker.inference.torch_scorer import TorchScorer
from models.ranker.options import RankerTraining

LENGTHS = (5, 10, 15, 20)
"""Title lengths of the paper's figure, in tokens."""


def measure(section: Section) -> None:
    """Record every figure as soon as it is measured."""
    shape = TINY if section.dry_run else LLAMA_2_7B
    dtype: Dtype = "float32" if section.dry_run else "float16"
    base, merged = section.work / "base", section.work / "merged"
    embedded, device = section.embedded_base(), section.device
    section.record("shape", {"name": shape.name, "layers": shape.layers, "hidden": shape.hidden})
    section.record("write_seconds", seconds_of(lambda: write_model(shape, embedded, base, device), device))
    tune(section, base, merged)
    shutil.rmtree(base)
    reset_peak(device)
    runtime = Runtime(dtype=dtype, threads=torch.get_num_threads(), device=device)
    section.record("load_seconds", seconds_of(lambda: TorchScorer(merged, runtime), device))
    section.record("load_peak_bytes", peak_bytes(device))
    prompts = prompts_of(section.data(), merged, 2 if section.dry_run else 8)
    tokens = statistics.mean(len(prompt.tokens) for prompt in prompts)
    section.record("ranking", {"tokens": tokens, **ranking(shape, merged, dtype, section, prompts)})
    titles = " ".join(section.data().catalogue.title(number) for number in range(1, 200))
    for length in LENGTHS[:1] if section.dry_run else LENGTHS:
        rows = compare_with_generation(merged, runtime, titles.split(), [length], 1, time.perf_counter)
        section.record("figure_3", [*section.findings.get("figure_3", []), *rows])


def tune(section: Section, base: Path, merged: Path) -> None:
    """Record QLoRA steps with the paper's options, and merge; nothing of it is left in the device's memory."""
    options = RankerTraining(batch_size=4 if section.dry_run else 16, device=section.device)
    fitted, steps = train_steps(section, base, options)
    section.record("qlora", steps)
    section.record("merge_seconds", seconds_of(lambda: save_merged(fitted.model, base, merged), section.device))


if __name__ == "__main__":
    measure(section_of(__doc__)[0])
