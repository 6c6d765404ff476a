"""Measures the lean forward beside transformers' layers: operations a layer, prompts a second, and equal bits.

python -m benchmarks.device forward
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.device.correctness import deviation
from benchmarks.device.section import Section, section_of
from benchmarks.device.shapes import LLAMA_2_7B, TINY, Shape, write_model
from benchmarks.device.small_models import BOTH, prompts_of
from benchmarks.device.timing import matmul_rate, median_seconds
from models.ranker.forward.attention import Attention, Sequences, attention_for
from models.ranker.forward.batch import BUCKET_ROWS, Bucket, Item, pack
from models.ranker.forward.graphs import Passes
from models.ranker.forward.model import Forward
from models.ranker.forward.shape import shape_of
from models.ranker.forward.weights import fuse
from models.ranker.inference.packed_scorer import PackedScorer
from models.ranker.inference.scorer import Dtype, Runtime
from models.ranker.inference.torch_scorer import TorchScorer
from models.ranker.precision import DTYPES
from models.ranker.prompt import RESPONSE, TOKENIZER_FILE, Prompt, PromptBuilder, PromptSettings, letter_ids
from preprocessing.data import Data

ROUNDS = 5
PROMPTS = 128
GOAL = 16
"""Operations a layer that the forward was designed for."""
SHAPES = (*BOTH, LLAMA_2_7B)


class Counted(TorchDispatchMode):
    """Counts the operations of PyTorch that compute or copy; views of tensors are not among them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch does not annotate it
        self.count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operation and count it, unless its result is a view of what it was given."""
        self.count += not func.is_view and func is not torch.ops.aten.detach.default
        return func(*args, **(kwargs or {}))


def measure(section: Section) -> None:
    """Record the operations a layer, and for every shape and precision the time of a prompt alone and packed."""
    section.record("operations_a_layer", operations_a_layer())
    data, base = section.data(), section.embedded_base()
    precisions: Sequence[Dtype] = ("float32", "float8") if section.dry_run else ("float16", "bfloat16", "float8")
    for shape in (TINY,) if section.dry_run else SHAPES:
        folder = write_model(shape, base, section.work / shape.name.replace(" ", "-"), section.device)
        count = 4 if section.dry_run else PROMPTS
        found: dict[str, Any] = {}
        for dtype in precisions:
            found[f"letters, {dtype}"] = letters(shape, folder, dtype, section, prompts_of(data, folder, count))
            section.record(shape.name, found)
            found[f"independent lines, {dtype}"] = independent_lines(shape, folder, dtype, section, data, count)
            section.record(shape.name, found)


def operations_a_layer() -> dict[str, int]:
    """Return the operations that one more layer adds to a pass of each kind.

    They are counted on the processor. Attention is one operation in both: the lean forward's kernel does not run there,
    and an operation stands for it.
    """
    return {
        "transformers": _added(_transformers),
        "lean, letters": _added(partial(_lean, lines=False)),
        "lean, independent lines": _added(partial(_lean, lines=True)),
    }


def _added(run_of: Callable[[Any], Callable[[], Any]]) -> int:
    """Return how many operations more a model of three layers takes than one of two; the last layer is another."""
    counts: list[int] = []
    for layers in (2, 3):
        config = LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2,
        )  # fmt: skip
        run = run_of(LlamaForCausalLM(config).eval())
        with torch.inference_mode(), Counted() as counted:
            run()
        counts.append(counted.count)
    return counts[1] - counts[0]


def _transformers(model: Any) -> Callable[[], Any]:
    tokens = torch.arange(32)[None]
    return lambda: model.model(input_ids=tokens, use_cache=False).last_hidden_state


def _lean(model: Any, lines: bool) -> Callable[[], Any]:
    shape, device = shape_of(model.config), torch.device("cpu")
    weights = fuse(model.state_dict(), shape, torch.float32, device)
    passes = Passes(Forward(model.config, shape, weights, Attention(_one_operation, captures=False)), device)
    bucket = Bucket(512, lines)
    tokens = list(range(32))
    arrays = pack([Item.of_lines(tokens, [tokens]) if lines else Item.whole(tokens, [31])], bucket)
    return lambda: passes(arrays, bucket)


def _one_operation(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences) -> Tensor:
    return torch.zeros_like(query)


def letters(shape: Shape, folder: Path, dtype: Dtype, section: Section, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Return the measurements of prompts that are read at their letters; see :func:`_measured`."""
    labels = letter_ids(Tokenizer.from_file(str(folder / TOKENIZER_FILE)), RESPONSE)
    return _measured(
        shape, folder, dtype, section, prompts,
        packed=lambda scorer, given: list(scorer.score([prompt.tokens for prompt in given], labels)),
        before=lambda scorer, prompt: scorer.score([prompt.tokens], labels)[0],
    )  # fmt: skip


def independent_lines(
    shape: Shape, folder: Path, dtype: Dtype, section: Section, data: Data, count: int
) -> dict[str, Any]:
    """Return the measurements of prompts with 20 independent lines; see :func:`_measured`."""
    settings = PromptSettings(candidates=20, independent=True)
    builder = PromptBuilder(data.catalogue, Tokenizer.from_file(str(folder / TOKENIZER_FILE)), settings)
    draw = np.random.default_rng(0)
    prompts = [
        builder.build(history, (draw.choice(data.catalogue.trained, 20, replace=False) + 1).tolist())
        for history in data.test_histories()[:count]
    ]
    direction = draw.normal(size=shape.hidden).astype(np.float32)
    return _measured(
        shape, folder, dtype, section, prompts,
        packed=lambda scorer, given: scorer.score_prompts(given, direction),
        before=lambda scorer, prompt: scorer.score_independent(prompt, direction),
    )  # fmt: skip


def _measured(
    shape: Shape,
    folder: Path,
    dtype: Dtype,
    section: Section,
    prompts: Sequence[Prompt],
    packed: Callable[[PackedScorer, Sequence[Prompt]], list[NDArray[np.float32]]],
    before: Callable[[TorchScorer, Prompt], NDArray[np.float32]],
) -> dict[str, Any]:
    """Return the passes that keep scores independent, and seconds a prompt: in transformers, packed alone and together.

    Also how far scores are from those of transformers in the same precision (in bf16 beside fp8), and whether packed
    prompts have the bits that they have alone.
    """
    runtime = Runtime(dtype=dtype, threads=torch.get_num_threads(), device=section.device)
    reference = TorchScorer(folder, replace(runtime, dtype="bfloat16") if dtype == "float8" else runtime)
    reference.settle(prompts)
    few = prompts[:8]
    expected = [before(reference, prompt) for prompt in few]
    rounds = 1 if section.dry_run else ROUNDS
    seconds = {"transformers": median_seconds(partial(before, reference, few[0]), section.device, rounds)}
    del reference
    scorer = PackedScorer(folder, runtime, BUCKET_ROWS[:1] if section.dry_run else None)
    scorer.settle(prompts)
    alone = [packed(scorer, [prompt])[0] for prompt in few]
    together = packed(scorer, prompts)
    seconds["packed, alone"] = median_seconds(partial(packed, scorer, few[:1]), section.device, rounds)
    every = median_seconds(partial(packed, scorer, prompts), section.device, rounds) / len(prompts)
    seconds["packed, together"] = every
    rate = matmul_rate(section.device, DTYPES[dtype], 256 if section.dry_run else 8192)
    tokens = statistics.mean(len(prompt.tokens) for prompt in prompts)
    return {
        "tokens": tokens,
        "passes": asdict(scorer.settled),
        "kernel": attention_for(torch.device(section.device), DTYPES[dtype], scorer.shape.width).captures,
        "seconds": seconds,
        "prompts_a_second": 1 / every,
        "share_of_matmul": shape.operations(int(tokens)) / every / rate,
        "deviation": max(
            deviation(found[None], [wanted.tolist()]) for found, wanted in zip(alone, expected, strict=True)
        ),
        "bit_equal": all(a.tobytes() == b.tobytes() for a, b in zip(alone, together, strict=False)),
    }


if __name__ == "__main__":
    measure(section_of(__doc__)[0])
