"""Measures steps of the ranker's real training loop."""

import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.device.section import Section
from benchmarks.device.timing import peak_bytes, reset_peak
from models.checkpoint import Checkpoint
from models.ranker.examples.sets import training_examples, validation_examples, validation_table
from models.ranker.fitting.base_checks import load_checked
from models.ranker.fitting.loop import FittedRanker, fit
from models.ranker.options import RankerTraining
from models.ranker.prompt import RESPONSE, TOKENIZER_FILE, PromptBuilder, PromptSettings, letter_ids

STEPS, DRY_STEPS = 12, 3


class StepClock(Checkpoint):
    """A checkpoint that writes nothing and notes the seconds spent in steps so far."""

    def __init__(self) -> None:
        """Start without a note."""
        super().__init__(Path("unwritten"), {}, {})
        self.seconds: list[float] = []

    def save(self, state: Mapping[str, Any]) -> None:
        """Note the seconds."""
        self.seconds.append(state["progress"]["seconds"])

    def load(self) -> None:
        """Return nothing: the training starts anew."""


def train_steps(section: Section, base: Path, options: RankerTraining) -> tuple[FittedRanker, dict[str, Any]]:
    """Train for a few steps, and return the tuned model, the median seconds of a step, and the peak of memory.

    Args:
        section: names the artifacts and the folder for weights.
        base: folder of the base model.
        options: of the training; the number of prompts and the validation are set here.
    """
    steps = DRY_STEPS if section.dry_run else STEPS
    prompts = steps * options.batch_size
    options = replace(options, max_prompts=prompts, validate_every=steps, checkpoint_every=1, checkpoint_minutes=0)
    data, tokenizer = section.data(), Tokenizer.from_file(str(base / TOKENIZER_FILE))
    builder = PromptBuilder(data.catalogue, tokenizer, PromptSettings())
    examples = training_examples(options, section.artifacts, data)
    validation = validation_examples(validation_table(section.artifacts, data, options.candidates), data)[:2]
    clock = StepClock()
    reset_peak(section.device)
    letters = letter_ids(tokenizer, RESPONSE)
    checked = [builder.build(row.history, row.candidates) for row in validation]
    model = load_checked(options, base, tokenizer, checked, letters)
    fitted = fit(options, model, builder, letters, examples, validation, clock, section.work / "training")
    tokens = statistics.mean(len(builder.build(row.history, row.candidates).tokens) for row in examples)
    seconds = [after - before for before, after in zip(clock.seconds, clock.seconds[1:], strict=False)]
    median = statistics.median(seconds[1:])  # the first step also loads kernels
    return fitted, {
        "seconds_a_step": median,
        "prompts_a_step": options.batch_size,
        "tokens_a_prompt": tokens,
        "prompts_a_second": options.batch_size / median,
        "peak_bytes": peak_bytes(section.device),
    }
