"""Measures the trainer beside what it did before: operations a layer, ranker's steps, validation, retriever's steps.

python -m benchmarks.device training

Before, the attention was computed segment by segment, in micro-batches of 4 whose losses were read one by one;
validation took one prompt at a time; LRURec's scan ran step by step and its loss in chunks for a processor's cache.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.device.forward import Counted
from benchmarks.device.section import Section, section_of
from benchmarks.device.shapes import LLAMA_32_1B, SMOLLM2, TINY, Shape, write_model
from benchmarks.device.timing import median_seconds, peak_bytes, reset_peak
from benchmarks.retriever_step import SHAPES, batch, mean_loss
from models.ranker.examples.sampling import Example
from models.ranker.fitting import loop, packing, validation
from models.ranker.fitting.objective import Objective, new_objective
from models.ranker.fitting.packing import TREE_ATTENTION
from models.ranker.fitting.qlora import add_adapters, load_base
from models.ranker.forward.attention import Sequences
from models.ranker.options import RankerTraining, Read, TrainingDtype
from models.ranker.precision import DTYPES
from models.ranker.prompt import RESPONSE, TOKENIZER_FILE, Prompt, PromptBuilder, letter_ids
from models.retriever.architectures import lrurec
from models.retriever.fitting import cross_entropy
from preprocessing.data import Data

ROUNDS, PROMPTS = 5, 16
MICRO_BATCH = 4
"""Number of prompts that were computed at once before."""
CANDIDATES = 20
READS: tuple[Read, ...] = ("letters", "independent-lines")


@contextmanager
def as_before() -> Iterator[None]:
    """Compute attention, scan and cross-entropy within the block as they were computed before."""
    with ExitStack() as stack:
        for module, name, earlier in (
            (packing, "attends_at_once", lambda query, scaling: None),
            (validation, "tokens_at_once", lambda device: 0),
            (lrurec, "scan_of", lambda device: lrurec._Scan.apply),
            (cross_entropy, "chunk_of", lambda device: cross_entropy.CHUNK),
        ):
            stack.enter_context(patch.object(module, name, earlier))
        yield


def measure(section: Section) -> None:
    """Record the operations, and the seconds of each part side by side."""
    section.record("operations_a_layer", operations_a_layer())
    shapes: Sequence[Shape] = (TINY,) if section.dry_run else (SMOLLM2, LLAMA_32_1B)
    data, base = section.data(), section.embedded_base()
    for shape in shapes:
        folder = write_model(shape, base, section.work / shape.name.replace(" ", "-"), section.device)
        for read in READS:
            found = ranker(folder, options_of(read, section), data, section)
            section.record(f"{shape.name}, {read}", found)
    for name in ("beauty",) if section.dry_run else SHAPES:
        section.record(f"LRURec, {name}", retriever(name, section.device))


def options_of(read: Read, section: Section) -> RankerTraining:
    """Return the options of a training in the best precision of the device, without quantisation."""
    dtype: TrainingDtype = "float32" if section.dry_run else "bfloat16"
    return RankerTraining(read=read, dtype=dtype, quantisation="none", dropout=0.0, device=section.device)


def ranker(folder: Path, options: RankerTraining, data: Data, section: Section) -> dict[str, Any]:
    """Return the seconds of a step of 16 prompts, and of a validation of as many, before and now."""
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    prompts = PromptBuilder(data.catalogue, tokenizer, options.prompt_settings())
    examples = examples_of(data, 4 if section.dry_run else PROMPTS)
    built = [(prompts.build(row.history, row.candidates), row) for row in examples]
    model = load_base(folder, quantisation="none", dtype=DTYPES[options.dtype], device=section.device)
    model = add_adapters(model, rank=options.rank, alpha=options.alpha, dropout=0.0, targets=options.targets)
    objective = new_objective(options, model, letter_ids(tokenizer, RESPONSE))
    step = partial(take_step, model, objective, built)
    validate = partial(validation.score_examples, model, objective, prompts, examples)
    rounds = 2 if section.dry_run else ROUNDS
    found: dict[str, Any] = {"tokens": sum(len(prompt.tokens) for prompt, _ in built), "prompts": len(built)}
    for name, run in side_by_side({"step": step, "validation": validate}).items():
        reset_peak(section.device)
        found[name] = {"seconds": median_seconds(run, section.device, rounds), "peak_bytes": peak_bytes(section.device)}
    return found


def side_by_side(runs: dict[str, Callable[..., Any]]) -> dict[str, Callable[[], Any]]:
    """Return each function as it is now, and as it was before."""

    def earlier(run: Callable[..., Any], **given: Any) -> Any:
        with as_before():
            return run(**given)

    both: dict[str, Callable[[], Any]] = {}
    for name, run in runs.items():
        given = {"micro_batch": MICRO_BATCH, "read": True} if name == "step" else {}
        both |= {f"{name}, before": partial(earlier, run, **given), f"{name}, now": run}
    return both


def take_step(
    model: Any, objective: Objective, built: loop.Built, micro_batch: int = PROMPTS, read: bool = False
) -> None:
    """Compute the gradient of a batch, and wait for the loss of each micro-batch if it is to be ``read``."""
    for start in range(0, len(built), micro_batch):
        loss = loop._accumulate(model, objective, built[start : start + micro_batch], micro_batch, len(built))
        if read:
            float(loss)
    model.zero_grad(set_to_none=True)
    for tensor in objective.trained:
        tensor.grad = None


def examples_of(data: Data, count: int) -> list[Example]:
    """Return the first users' histories, each with random candidates of which the first is the true one."""
    draw = np.random.default_rng(0)
    return [
        Example(
            history, draw.choice(data.catalogue.trained, CANDIDATES, replace=False) + 1, 0, np.zeros(CANDIDATES, "f4")
        )
        for history in data.test_histories()[:count]
    ]


def retriever(name: str, device: str) -> dict[str, float]:
    """Return the seconds of the gradient of a batch of LRURec, before and now."""
    items = SHAPES[name][2]
    model = lrurec.LRURec(items).to(device).train()
    inputs, targets = (tensor.to(device) for tensor in batch(name, 0))

    def step() -> None:
        mean_loss(model, inputs, targets).backward()
        model.zero_grad(set_to_none=True)

    both = side_by_side({"gradient": step})
    return {key: median_seconds(run, device, ROUNDS) for key, run in both.items()}


class _OneOperation(torch.autograd.Function):
    """Stands for the kernel of the attention, which does not run on a processor: one operation each way."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sequences: Sequences) -> Tensor:
        ctx.key = key
        return query * 1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        return grad, torch.empty_like(ctx.key), torch.empty_like(ctx.key), None


def operations_a_layer() -> dict[str, int]:
    """Return the operations that one more layer adds to the gradient of 16 prompts.

    They are counted on the processor. The kernel of the attention is one operation forward and three backward.
    """
    kernel: Any = _OneOperation.apply
    found = {}
    for read in READS:
        with as_before():
            found[f"{read}, before"] = _added(read, MICRO_BATCH)
        with patch.object(packing, "attends_at_once", lambda query, scaling: kernel):
            found[f"{read}, now"] = _added(read, PROMPTS)
    return found


def _added(read: Read, micro_batch: int) -> int:
    """Return how many operations more a model of three layers takes than one of two."""
    options = RankerTraining(read=read)
    counts: list[int] = []
    for layers in (2, 3):
        config = LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2,
        )  # fmt: skip
        base = LlamaForCausalLM(config).requires_grad_(False)
        base.set_attn_implementation(TREE_ATTENTION)
        model = add_adapters(base, rank=2, alpha=4, dropout=0.0, targets=options.targets)
        with Counted() as counted:
            take_step(model, new_objective(options, model, range(CANDIDATES)), _made_up(read), micro_batch)
        counts.append(counted.count)
    return counts[1] - counts[0]


def _made_up(read: Read) -> loop.Built:
    """Return prompts of 20 lines that share the instruction alone."""
    lines = [[number % 64] * 3 for number in range(CANDIDATES)]
    row = Example(np.empty(0, np.int32), np.arange(CANDIDATES), 0, np.zeros(CANDIDATES, np.float32))
    prompts = [Prompt.of_lines([*range(32), *[number] * 16], lines) for number in range(PROMPTS)]
    if read == "letters":
        prompts = [Prompt(prompt.tokens, prompt.line_ends) for prompt in prompts]
    return [(prompt, row) for prompt in prompts]


if __name__ == "__main__":
    measure(section_of(__doc__)[0])
