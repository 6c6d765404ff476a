"""The lean forward computes what transformers computes; the reference of every number is transformers in fp32."""

from contextlib import nullcontext
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from models.ranker.forward import attention
from models.ranker.forward.attention import Sequences, attend_by_sequence, attend_with_kernel, attention_for
from models.ranker.forward.batch import Bucket, Item, pack
from models.ranker.forward.graphs import COLUMNS, Passes
from models.ranker.forward.model import Forward, without_split_k
from models.ranker.forward.shape import UnsupportedBaseError, shape_of
from models.ranker.forward.weights import fuse, head_of

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped heads": ("Llama", {}),
    "a key head for each query head": ("Llama", {"num_key_value_heads": 4}),
    "one key head": ("Llama", {"num_key_value_heads": 1}),
    "one layer": ("Llama", {"num_hidden_layers": 1}),
    "wide heads": ("Llama", {"head_dim": 32}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "tied heads": ("Llama", {"tie_word_embeddings": True}),
    "another base of the angles": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama3": ("Llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, **LLAMA3}}),
    "yarn": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 8.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "Mistral": ("Mistral", {"sliding_window": None}),
    "Qwen2": ("Qwen2", {}),
}
LENGTHS = (1, 37, 150)
BUCKET = Bucket(512, lines=False)


def model_of(name: str) -> Any:
    """Return a random model of transformers in fp32; no vector of it is all zeros or ones."""
    family, changed = BASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changed})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def passes_of(model: Any, dtype: torch.dtype = torch.float32, *, float8: bool = False) -> Passes:
    """Return the lean passes with the model's weights on the processor."""
    shape, device = shape_of(model.config), torch.device("cpu")
    weights = fuse(model.state_dict(), shape, dtype, device, float8=float8)
    return Passes(Forward(model.config, shape, weights, attention_for(device, dtype, shape.width)), device)


def prompts() -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, SIZES["vocab_size"], length).tolist() for length in LENGTHS]


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Compare within 1e-5 of the largest value."""
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", BASES)
@torch.inference_mode()
def test_states_and_letters_are_those_of_transformers(name: str):
    """Prompts of several lengths share a pass; each is compared with itself alone in transformers, at three places."""
    model, given = model_of(name), prompts()
    passes, shape = passes_of(model), shape_of(model.config)
    letters = [7, 8, 9]
    passes.readout[:, : len(letters)] = head_of(model.state_dict(), shape)[letters].t()
    places = [[0, len(prompt) // 2, len(prompt) - 1] for prompt in given]
    outcome = passes(pack(list(map(Item.whole, given, places)), BUCKET), BUCKET)
    for number, (prompt, read) in enumerate(zip(given, places, strict=True)):
        expected = model(input_ids=torch.tensor([prompt]), output_hidden_states=True)
        rows = slice(3 * number, 3 * number + 3)
        assert_close(outcome.states[rows], expected.hidden_states[-1][0, read])
        assert_close(outcome.scores[rows, :3], expected.logits[0, read][:, letters])
    assert outcome.scores.shape == (BUCKET.reads, COLUMNS)


@pytest.mark.parametrize("name", ["grouped heads", "Qwen2"])
@torch.inference_mode()
def test_lines_are_computed_as_if_each_alone_continued_the_prefix(name: str):
    """The reference is transformers over the prefix and one line; two prompts share the pass."""
    model, bucket = model_of(name), Bucket(512, lines=True)
    prefixes = [list(range(100, 137)), list(range(90, 150))]
    lines = [[[200 + number, *range(30, 30 + number % 5)] for number in range(count)] for count in (5, 3)]
    outcome = passes_of(model)(pack(list(map(Item.of_lines, prefixes, lines)), bucket), bucket)
    alone = [
        model(input_ids=torch.tensor([[*prefix, *line]]), output_hidden_states=True).hidden_states[-1][0, -1]
        for prefix, own in zip(prefixes, lines, strict=True)
        for line in own
    ]
    assert_close(outcome.states[:8], torch.stack(alone))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_has_the_same_bits_alone_and_packed(dtype: torch.dtype):
    """On this machine a row of a product does not depend on the others; at load, the promise is checked anew."""
    passes, given = passes_of(model_of("grouped heads"), dtype), prompts()
    items = [Item.whole(prompt, [len(prompt) - 1]) for prompt in given]
    together = passes(pack(items, BUCKET), BUCKET).states
    alone = [passes(pack([item], BUCKET), BUCKET).states[0] for item in items]
    assert torch.equal(together[: len(items)], torch.stack(alone))


@pytest.mark.parametrize("name", ["grouped heads", "biases"])
def test_fp8_is_near_fp32_and_keeps_bits_in_company(name: str):
    """The states of a random model move by less than a quarter in the mean, and by more than bf16 alone moves them."""
    model = model_of(name)
    in_fp8, in_bf16 = passes_of(model, torch.bfloat16, float8=True), passes_of(model, torch.bfloat16)
    items = [Item.whole(prompt, [len(prompt) - 1]) for prompt in prompts()]
    found, rounded, exact = (run(pack(items, BUCKET), BUCKET).states[:3] for run in (in_fp8, in_bf16, passes_of(model)))
    assert (rounded - exact).norm() < (found - exact).norm() < 0.25 * exact.norm()
    alone = [in_fp8(pack([item], BUCKET), BUCKET).states[0] for item in items]
    assert torch.equal(found, torch.stack(alone))


@pytest.mark.parametrize(
    ("kind", "changed", "reason"),
    [
        ("Gemma", {"head_dim": 16}, "compute gemma: its layers are not those of llama, mistral or qwen2"),
        ("Qwen3", {"head_dim": 16}, "compute qwen3: its layers are not"),
        ("Llama", {"hidden_act": "gelu"}, "compute llama: its activation is gelu, not silu"),
        ("Mistral", {"sliding_window": 128}, "compute mistral: its attention slides over 128 of 512 positions"),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "slides over 64 of 512"),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "its rotary embedding is dynamic, not one of default, linear, llama3, yarn",
        ),
        (
            "Llama",
            {
                "rope_parameters": {
                    "rope_type": "linear",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "partial_rotary_factor": 0.5,
                }
            },
            "turns a part of each head only",
        ),
        ("Llama", {"quantization_config": {"load_in_4bit": True}}, "its weights are quantised"),
    ],
)
def test_other_bases_are_refused_in_one_sentence(kind: str, changed: dict[str, Any], reason: str):
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changed})
    with pytest.raises(UnsupportedBaseError, match=reason):
        shape_of(config)


def packed(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Sequences]:
    """Return random queries of 4 heads, keys and values of 2, and sequences with 3, 0 and 2 queries, 3, 4 and 6 keys.

    The second sequence is empty of queries.
    """
    torch.manual_seed(1)
    query, key, value = (torch.randn(rows, heads, 8).to(dtype) for rows, heads in ((5, 4), (13, 2), (13, 2)))
    ends = (torch.tensor([0, 3, 3, 5], dtype=torch.int32), torch.tensor([0, 3, 7, 13], dtype=torch.int32))
    return query, key, value, Sequences(*ends, 6)


def by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return softmax(Q K^T / sqrt(d) + mask) V of one sequence (Vaswani et al. 2017), row by row and head by head."""
    rows, heads, width = query.shape
    out = torch.empty_like(query)
    for row in range(rows):
        seen = len(key) - rows + row + 1  # the last query sees every key
        for head in range(heads):
            group = head * key.shape[1] // heads
            weights = (key[:seen, group] @ query[row, head] / width**0.5).softmax(0)
            out[row, head] = weights @ value[:seen, group]
    return out


def test_the_twin_is_causal_and_aligned_at_the_bottom_right():
    """The expected values are the formula's; a sequence without queries leaves the others' rows where they are."""
    query, key, value, sequences = packed()
    found = attend_by_sequence(query, key, value, sequences)
    expected = [by_hand(query[:3], key[:3], value[:3]), by_hand(query[3:], key[7:], value[7:])]
    torch.testing.assert_close(found, torch.cat(expected))


@pytest.mark.parametrize("grouped", [True, False])
def test_the_kernel_is_called_for_causal_attention(monkeypatch: pytest.MonkeyPatch, grouped: bool):
    """A stand-in with the kernel's signature computes what it is asked for; it has not run on a GPU.

    The window (-1, 0) is the kernel's name for causal attention aligned at the bottom right. A version of PyTorch whose
    kernel knows no grouped heads is given repeated keys and values.
    """
    calls: list[tuple[int, int]] = []

    def kernel(query, key, value, queries, keys, max_q, max_k, *, window_size, enable_gqa=False):
        assert (window_size, enable_gqa, max_q, max_k) == ((-1, 0), grouped, 6, 6)
        calls.append((query.shape[1], key.shape[1]))
        return attend_by_sequence(query, key, value, Sequences(queries, keys, max_k))

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "GROUPED", grouped)
    given = packed()
    torch.testing.assert_close(attend_with_kernel(*given), attend_by_sequence(*given))
    assert calls == [(4, 2 if grouped else 4)]


def test_the_kernel_computes_half_precision_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch):
    """In fp32 it does not exist, and a CUDA graph cannot contain the twin, which reads the lengths."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(attention, "KERNEL", True)
    assert attention_for(gpu, torch.float16, 64) == attention_for(gpu, torch.bfloat16, 128)
    assert attention_for(gpu, torch.float16, 64).captures
    for device, dtype, width in ((gpu, torch.float32, 64), (gpu, torch.float16, 36), (cpu, torch.bfloat16, 64)):
        assert attention_for(device, dtype, width) == attention.Attention(attend_by_sequence, captures=False)
    monkeypatch.setattr(attention, "KERNEL", False)
    assert not attention_for(gpu, torch.float16, 64).captures


@pytest.mark.gpu
def test_the_kernel_equals_the_twin_on_a_gpu():
    """The kernel in fp16 against the twin in fp32 on the processor; a sequence of the pass is empty."""
    query, key, value, sequences = packed(torch.float16)
    expected = attend_by_sequence(query.float(), key.float(), value.float(), sequences)
    there = Sequences(sequences.queries.cuda(), sequences.keys.cuda(), sequences.longest)
    found = attend_with_kernel(query.cuda(), key.cuda(), value.cuda(), there)
    torch.testing.assert_close(found.float().cpu(), expected, atol=5e-3, rtol=0)


class Replayed:
    """Stands in for a CUDA graph: it repeats the computation into the tensors that were captured."""

    def __init__(self) -> None:
        self.repeat: Any = None

    def replay(self) -> None:
        self.repeat()


@pytest.mark.parametrize("lines", [False, True])
def test_a_capture_reads_its_own_arrays_and_overwrites_its_outcome(monkeypatch: pytest.MonkeyPatch, lines: bool):
    """The steps around CUDA's graph on the processor, with stand-ins for streams and the graph; no GPU is there."""
    for name in ("Stream", "current_stream", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    for name in ("stream", "graph", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda *given, **named: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Replayed)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    passes, bucket = passes_of(model_of("grouped heads")), Bucket(512, lines)
    given = [pack([Item.of_lines(prompt, [[5, 6], [7]] if lines else [])], bucket) for prompt in prompts()]
    plain = [passes(arrays, bucket) for arrays in given]
    passes.capture(bucket)
    assert not passes._captured  # the twin cannot be captured
    passes._forward.attention = attention.Attention(attend_by_sequence, captures=True)
    passes.capture(bucket)
    captured = passes._captured[bucket]

    @torch.inference_mode()
    def repeat() -> None:
        outcome = passes.compute(captured._arrays, bucket)
        captured._outcome.states.copy_(outcome.states)
        captured._outcome.scores.copy_(outcome.scores)

    captured._graph.repeat = repeat
    for arrays, expected in zip(given, plain, strict=True):
        found = passes(arrays, bucket)
        assert found is captured._outcome
        assert torch.equal(found.states, expected.states)
        assert torch.equal(found.scores, expected.scores)


@pytest.mark.gpu
@pytest.mark.parametrize("lines", [False, True])
def test_a_captured_pass_has_the_bits_of_one_that_is_not(lines: bool):
    """Two different passes go through one graph, so that what the first left behind would show."""
    model, device, bucket = LlamaForCausalLM(LlamaConfig(**SIZES)), torch.device("cuda"), Bucket(512, lines)
    shape = shape_of(model.config)
    weights = fuse(model.state_dict(), shape, torch.float16, device)
    passes = Passes(Forward(model.config, shape, weights, attention_for(device, torch.float16, shape.width)), device)
    make = (lambda prompt: Item.of_lines(prompt, [[5, 6], [7]])) if lines else (lambda prompt: Item.whole(prompt, [0]))
    given = [pack([make(prompt)], bucket) for prompt in prompts()]
    plain = [passes(arrays, bucket).states.cpu() for arrays in given]
    passes.capture(bucket)
    assert all(torch.equal(passes(a, bucket).states.cpu(), b) for a, b in zip(given, plain, strict=True))


def test_split_k_is_off():
    """PyTorch names it as the second of two values; the setting exists without a GPU."""
    without_split_k()
    matmul = torch.backends.cuda.matmul
    assert torch._C._get_cublas_allow_fp16_reduced_precision_reduction() == (False, False)
    assert not matmul.allow_bf16_reduced_precision_reduction
