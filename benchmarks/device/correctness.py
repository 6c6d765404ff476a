"""Compares a device with the processor in fp32: scores, losses, gradients, a merge and a resumed training.

The reference of the embedded base is in reference.json; a dry run computes that of a tiny model. Tolerances are those
that a different order of sums explains in each precision.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from benchmarks.device.reference import Reference, adapted, compute, losses_and_gradients, scores_of
from benchmarks.device.section import Section, section_of
from benchmarks.device.shapes import TINY, write_model
from models.checkpoint import Checkpoint
from models.ranker.examples.sets import training_examples, validation_examples, validation_table
from models.ranker.fitting.loop import fit
from models.ranker.fitting.merge import save_merged
from models.ranker.fitting.qlora import NF4, evaluating, letter_logits, load_base
from models.ranker.fusion import log_softmax
from models.ranker.inference.scorer import Dtype, Runtime
from models.ranker.inference.torch_scorer import TorchScorer
from models.ranker.options import RankerTraining
from models.ranker.precision import DTYPES
from models.ranker.prompt import RESPONSE, TOKENIZER_FILE, PromptBuilder, PromptSettings, letter_ids

SCORES: Mapping[Dtype, float] = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}
"""Largest deviation of a log-probability of a pretrained model, by precision."""
GRADIENTS = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest deviation of the projected gradient, relative to its norm."""
MERGED = 0.02
"""Largest deviation of a log-probability of the merged model, which is stored in fp16, from the tuned one."""
STEPS, STOPPED_AFTER = 6, 3


def measure(section: Section) -> None:
    """Record every comparison, each with its largest deviation and its tolerance."""
    base, reference = inputs(section)
    compare_scores(section, base, reference)
    compare_training(section, base, reference)
    section.record("resumed", resumed(section, base))


def inputs(section: Section) -> tuple[Path, Reference]:
    """Return the base and its reference: the embedded one, or in a dry run a tiny one with shortened prompts."""
    base = section.embedded_base()
    kept = Reference.read()
    if not section.dry_run:
        return base, kept
    tiny = write_model(TINY, base, section.work / "tiny", "cpu")
    return tiny, compute(tiny, kept.given.first(1))


def compare_scores(section: Section, base: Path, reference: Reference) -> None:
    """Record the deviation of the scores in each precision."""
    hidden = json.loads((base / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    precisions: Sequence[Dtype] = ("float32", "bfloat16") if section.dry_run else tuple(SCORES)
    found = {}
    for dtype in precisions:
        scorer = TorchScorer(base, Runtime(dtype=dtype, threads=torch.get_num_threads(), device=section.device))
        for name, rows in scores_of(scorer, reference.given, hidden).items():
            found[f"{dtype} {name}"] = checked(deviation(rows, reference.scores[name]), SCORES[dtype])
        section.record("scores", found)


def deviation(ours: NDArray[Any], theirs: Sequence[Sequence[float]]) -> float:
    """Return the largest difference of two sets of log-probabilities, given as logits [prompts, k]."""
    rows = zip(ours, np.array(theirs), strict=True)
    return max(float(np.abs(log_softmax(a) - log_softmax(b)).max()) for a, b in rows)


def checked(value: float, tolerance: float) -> dict[str, Any]:
    """Return a finding with its tolerance; a value that is not a number is not within it."""
    return {"deviation": float(f"{value:.3g}"), "tolerance": tolerance, "within": bool(value <= tolerance)}


def compare_training(section: Section, base: Path, reference: Reference) -> None:
    """Record the deviation of losses and gradients, and whether they survive an evaluation and a merge."""
    found = {}
    for quantisation in ("none", "nf4"):
        for dtype in ("bfloat16", "float32"):
            model = adapted(base, quantisation, DTYPES[dtype], section.device)
            for name, loss, sketch in losses_and_gradients(model, reference.given):
                key = f"{quantisation} {name}"
                found[f"{key}, {dtype}"] = {
                    "loss": checked(abs(loss / reference.losses[key] - 1), SCORES[dtype]),
                    "gradient": checked(distance(sketch, reference.gradients[key]), GRADIENTS[dtype]),
                }
                section.record("training", found)
    # The last model, NF4 in fp32, deviates by the merge alone.
    section.record("after an evaluation", after_evaluation(model, reference))
    section.record("merged", checked(merged_deviation(section, model, base, reference), MERGED))


def distance(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """Return the distance of two sets of projected gradients, relative to the second."""
    a, b = np.array(ours), np.array(theirs)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def after_evaluation(model: Any, reference: Reference) -> dict[str, Any]:
    """Return how far an evaluation between two backward passes moves the gradient, which is not at all."""
    before = {name: sketch for name, _, sketch in losses_and_gradients(model, reference.given)}
    scored(model, reference)
    after = {name: sketch for name, _, sketch in losses_and_gradients(model, reference.given)}
    return checked(max(distance(after[name], before[name]) for name in before), 1e-6)


def scored(model: Any, reference: Reference) -> NDArray[np.float32]:
    """Return the letters' logits of the model in training [prompts, 20]."""
    with evaluating(model):
        prompts, letters = reference.given.prompts, reference.given.letter_ids
        return np.stack([letter_logits(model, prompt.tokens, letters).cpu().numpy() for prompt in prompts])


def merged_deviation(section: Section, model: Any, base: Path, reference: Reference) -> float:
    """Return how far the merged model's log-probabilities in fp32 are from those of the model in training."""
    folder = section.work / "merged"
    save_merged(model, base, folder)
    scorer = TorchScorer(folder, Runtime(threads=torch.get_num_threads(), device=section.device))
    tokens = [prompt.tokens for prompt in reference.given.prompts]
    return deviation(scorer.score(tokens, reference.given.letter_ids), scored(model, reference).tolist())


class StopTrainingError(Exception):
    """A training was stopped on purpose."""


class StoppingCheckpoint(Checkpoint):
    """A checkpoint that stops the training once the step of that number is written."""

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the state, and stop at the step."""
        super().save(state)
        if state["progress"]["step"] == STOPPED_AFTER:
            raise StopTrainingError


def resumed(section: Section, base: Path) -> dict[str, Any]:
    """Return how far the adapters of a training that was stopped and resumed are from those of one that was not."""
    options = RankerTraining(
        batch_size=2,
        micro_batch_size=2,
        max_prompts=2 * STEPS,
        validation_users=2,
        validate_every=STEPS,
        checkpoint_minutes=0,
        checkpoint_every=1,
        max_history=5,
        device=section.device,
    )
    data = section.data()
    tokenizer = Tokenizer.from_file(str(base / TOKENIZER_FILE))
    prompts = PromptBuilder(data.catalogue, tokenizer, PromptSettings(max_history=options.max_history))
    letter_tokens = letter_ids(tokenizer, RESPONSE)
    examples = training_examples(options, section.artifacts, data)
    validation = validation_examples(validation_table(section.artifacts, data, options.candidates), data)[:2]
    ways: dict[str, list[torch.Tensor]] = {}

    def train(name: str, checkpoint: Checkpoint) -> None:
        model = load_base(base, quantisation=NF4, dtype=torch.float32, device=section.device)
        fitted = fit(options, model, prompts, letter_tokens, examples, validation, checkpoint, section.work / name)
        ways[name] = [value.detach().cpu() for value in fitted.model.parameters() if value.requires_grad]

    path = section.work / "checkpoint.pt"
    path.unlink(missing_ok=True)
    try:
        train("stopped", StoppingCheckpoint(path, {}, {}))
    except StopTrainingError:
        train("resumed", Checkpoint(path, {}, {}))
    path.unlink()
    train("whole", Checkpoint(path, {}, {}))
    furthest = max(float((a - b).abs().max()) for a, b in zip(ways["resumed"], ways["whole"], strict=True))
    return checked(furthest, 1e-5)


if __name__ == "__main__":
    measure(section_of(__doc__)[0])
