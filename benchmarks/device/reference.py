"""Computes the scores, losses and gradients that the correctness section compares a device with.

    python -m benchmarks.device.reference    # writes reference.json beside this file, from the embedded base

The reference is the processor in fp32. Gradients are kept as random projections, two for each adapter, because the
gradients themselves would be megabytes.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.movie_prompts import embedded_base, letters, movie_prompts
from models.ranker.fitting.qlora import add_adapters, answer_loss, line_loss, load_base
from models.ranker.inference.scorer import Runtime, Scorer
from models.ranker.inference.torch_scorer import TorchScorer
from models.ranker.options import RankerTraining
from models.ranker.prompt import Prompt, PromptSettings

FILE = Path(__file__).with_name("reference.json")
PROMPTS = 3
PROJECTIONS = 2
END = 2
"""Token id of the embedded base's end of text."""
OPTIONS = RankerTraining()
"""The paper's adapters. Their dropout is left out here, since each device draws its own."""


class Given(NamedTuple):
    """What is scored."""

    prompts: list[Prompt]
    independent: list[Prompt]
    """Prompts whose lines are independent of each other."""
    letter_ids: list[int]

    def first(self, count: int) -> "Given":
        """Return the first ``count`` prompts of each kind."""
        return Given(self.prompts[:count], self.independent[:count], self.letter_ids)


@dataclass(frozen=True)
class Reference:
    """What the processor computes in fp32."""

    given: Given
    scores: dict[str, list[list[float]]]
    """Logits of each prompt's candidates [prompts, 20], by the ways to read them (:func:`scores_of`)."""
    losses: dict[str, float]
    """By quantisation and objective, such as ``nf4 letters``."""
    gradients: dict[str, list[list[float]]]
    """Random projections of the gradient of each adapter [adapters, projections], by the same names."""

    @classmethod
    def read(cls) -> "Reference":
        """Return the reference of the embedded base."""
        stored = json.loads(FILE.read_text(encoding="utf-8"))
        prompts, independent, letter_ids = stored.pop("given")
        given = Given([Prompt(*row) for row in prompts], [Prompt(*row) for row in independent], letter_ids)
        return cls(given, **stored)


def direction_of(hidden: int) -> NDArray[np.float32]:
    """Return a seeded random direction [hidden] for the lines."""
    return np.random.default_rng(0).standard_normal(hidden).astype(np.float32) / np.float32(hidden**0.5)


def scores_of(scorer: Scorer, given: Given, hidden: int) -> dict[str, NDArray[Any]]:
    """Return the logits [prompts, 20] of the letters, of the lines and of the independent lines.

    Those of lines are projections of their states onto :func:`direction_of`.
    """
    direction = direction_of(hidden)
    lines = [scorer.score_lines(prompt.tokens, prompt.line_ends, direction) for prompt in given.prompts]
    return {
        "letters": scorer.score([prompt.tokens for prompt in given.prompts], given.letter_ids),
        "lines": np.stack(lines),
        "independent lines": np.stack([scorer.score_independent(prompt, direction) for prompt in given.independent]),
    }


def adapted(base: Path, quantisation: str, dtype: torch.dtype, device: str) -> Any:
    """Return a base with the paper's adapters, whose values are random so that every adapter has a gradient."""
    model = load_base(base, quantisation=quantisation, dtype=dtype, device=device)
    model = add_adapters(
        model, rank=OPTIONS.rank, alpha=OPTIONS.alpha, dropout=0.0, targets=OPTIONS.targets, layers=None
    )
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for adapter in trained(model):
            adapter.copy_(torch.randn(adapter.shape, generator=draw) * 0.02)
    return model


def trained(model: Any) -> list[Tensor]:
    """Return the adapters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def losses_and_gradients(model: Any, given: Given) -> Iterator[tuple[str, float, list[list[float]]]]:
    """Yield each objective's name, its loss for the first candidates, and the projections of its gradient.

    Independent lines are left out: those of a tiny random model differ so little that in bf16 half of the gradient is
    rounding, and no tolerance says anything.
    """
    tokens, truths = [prompt.tokens for prompt in given.prompts], [0] * len(given.prompts)
    direction = torch.from_numpy(direction_of(model.config.hidden_size)).to(model.device)
    answers = [[given.letter_ids[0], END]] * len(tokens)
    scores = [torch.zeros(len(prompt.line_ends)) for prompt in given.prompts]
    objectives: Mapping[str, Callable[[], Tensor]] = {
        "letters": lambda: answer_loss(model, tokens, answers),
        "lines": lambda: line_loss(model, direction, given.prompts, truths, scores),
    }
    for name, loss in objectives.items():
        value = loss()
        torch.autograd.backward(value)
        yield name, float(value.detach()), projections(trained(model))
        model.zero_grad(set_to_none=True)


def projections(parameters: Sequence[Tensor]) -> list[list[float]]:
    """Return seeded random projections of each parameter's gradient, whose spread is the gradient's norm."""
    draw = torch.Generator().manual_seed(1)
    found = []
    for parameter in parameters:
        assert parameter.grad is not None, "every adapter has a gradient"
        signs = torch.randint(0, 2, (PROJECTIONS, parameter.numel()), generator=draw).float() * 2 - 1
        found.append((signs @ parameter.grad.detach().float().cpu().flatten()).tolist())
    return found


def compute(base: Path, given: Given) -> Reference:
    """Return the reference of a base on the processor."""
    scorer = TorchScorer(base, Runtime(threads=torch.get_num_threads()))
    hidden = json.loads((base / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    scores = {name: rows.tolist() for name, rows in scores_of(scorer, given, hidden).items()}
    losses, gradients = {}, {}
    for quantisation in ("none", "nf4"):
        model = adapted(base, quantisation, torch.float32, "cpu")
        for name, loss, sketch in losses_and_gradients(model, given):
            losses[f"{quantisation} {name}"], gradients[f"{quantisation} {name}"] = loss, sketch
    return Reference(given, scores, losses, gradients)


def rounded(value: Any) -> Any:
    """Return JSON content with its numbers in seven significant digits, those of fp32."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def main() -> None:
    """Write the reference of the embedded base."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    independent = movie_prompts(PROMPTS, settings=PromptSettings(independent=True))
    reference = compute(embedded_base(), Given(movie_prompts(PROMPTS), independent, letters()))
    FILE.write_text(json.dumps(rounded(asdict(reference))) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
