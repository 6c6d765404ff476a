"""Several prompts in one forward pass: nothing is padded, and what prompts begin with alike is computed once.

Prompts become a tree of segments. A token attends to its own segment up to itself and to the segments above it, which
are exactly the tokens before it in its prompt, at the same positions: loss and gradients are those of the prompts one
by one. Candidate pools of one history share the instruction and the history; histories that continue one another share
what they have in common.

Source: tree attention as in Miao et al. 2024 (SpecInfer, section 5.1), used for training.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from preprocessing.errors import InputError

TREE_ATTENTION = "prompt_tree"
"""Name under which transformers knows :func:`tree_attention`."""
SHORTEST_SHARED = 16
"""Tokens that prompts must have in common to be computed together: with fewer, a segment costs more than it saves."""

ATTENTION_BLOCK = 128
"""Tokens whose attention is computed at once in bf16 on a processor."""


@dataclass(frozen=True)
class Segment:
    """A run of tokens in the packed sequence, and what stands before it in its prompts."""

    start: int
    end: int
    above: tuple[tuple[int, int], ...]
    """Places [start, end) of the segments above, from the root."""
    mask: Tensor | None
    """[tokens, tokens above and its own] True where a token attends; None with nothing above: plain causal."""


@dataclass(frozen=True)
class PackedPrompts:
    """Token sequences as one sequence without padding."""

    tokens: Tensor
    """[1, total]"""
    positions: Tensor
    """[1, total] place of each token in its own prompt."""
    segments: tuple[Segment, ...]
    places: tuple[NDArray[np.int64], ...]
    """For each prompt, in the order given: the place in the packed sequence of each of its tokens."""


def pack(prompts: Sequence[Sequence[int]], device: torch.device | str = "cpu", *, share: bool = True) -> PackedPrompts:
    """Packs token sequences.

    Args:
        prompts: token ids, none empty.
        device: of the tensors.
        share: compute what prompts begin with alike only once.
    """
    order = sorted(range(len(prompts)), key=lambda row: list(prompts[row]))
    tokens: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    places: list[list[NDArray[np.int64]]] = [[] for _ in prompts]

    def grow(rows: Sequence[int], depth: int, above: tuple[tuple[int, int], ...]) -> None:
        for group in _alike(prompts, rows, depth) if share else ([row] for row in rows):
            first, last = prompts[group[0]], prompts[group[-1]]
            common = len(first) if len(group) == 1 else _common_length(first, last)
            start, end = len(tokens), len(tokens) + common - depth
            tokens.extend(first[depth:common])
            positions.extend(range(depth, common))
            mask = None
            if above:
                mask = torch.ones(end - start, common, dtype=torch.bool, device=device).tril(depth)
            segments.append(Segment(start, end, above, mask))
            for row in group:
                places[row].append(np.arange(start, end))
            if longer := [row for row in group if len(prompts[row]) > common]:
                grow(longer, common, (*above, (start, end)))

    grow(order, 0, ())
    return PackedPrompts(
        torch.tensor([tokens], device=device),
        torch.tensor([positions], device=device),
        tuple(segments),
        tuple(np.concatenate(parts) for parts in places),
    )


def _alike(prompts: Sequence[Sequence[int]], rows: Sequence[int], depth: int) -> Iterator[list[int]]:
    """Neighbours in sorted order that go on alike from ``depth`` for long enough to share it."""

    def beginning(row: int) -> tuple[int, ...]:
        return tuple(prompts[row][depth : depth + SHORTEST_SHARED])

    return (list(group) for _, group in groupby(rows, beginning))


def _common_length(first: Sequence[int], last: Sequence[int]) -> int:
    """How many tokens the first and the last of sorted sequences, and so all between, begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def tree_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Sequence[Segment] | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over packed prompts; without ``segments`` it is transformers' own for one prompt.

    Args:
        module: the attention layer.
        query: [1, heads, total, width]
        key: [1, key heads, total, width]
        value: [1, key heads, total, width]
        attention_mask: None.
        segments: of the packed prompts.
        scaling: of the dot products.
        kwargs: what transformers hands to every attention.

    Returns:
        [1, total, heads, width], and no weights.

    Raises:
        InputError: the model caps its attention scores.
    """
    if kwargs.get("softcap") is not None:
        raise InputError(f"{type(module).__name__} caps its attention scores: choose a base such as Llama 2")
    if segments is None:
        whole: tuple[Tensor, None]
        whole = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return whole
    groups = getattr(module, "num_key_value_groups", 1)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    # Split, not sliced: each slice's gradient would be a tensor of the whole packed length, and their sum most of the
    # attention's time.
    lengths = [segment.end - segment.start for segment in segments]
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    numbers = {segment.start: number for number, segment in enumerate(segments)}
    attended = []
    for number, segment in enumerate(segments):
        seen = [*(numbers[start] for start, _ in segment.above), number]
        seen_keys, seen_values = (torch.cat([x[row] for row in seen], dim=2) for x in (keys, values))
        attended.append(_attend(queries[number], seen_keys, seen_values, segment.mask, scaling))
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous(), None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """[1, heads, tokens, width]; causal without a mask."""
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling)
    # PyTorch's fused attention hardly uses the processor's bf16 products; plain ones are faster, forward and backward.
    # In blocks of tokens, which see nothing behind them, close to half of the products is left out.
    tokens, seen = query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(tokens, seen, dtype=torch.bool).tril()
    bias = torch.zeros(tokens, seen, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    queries = query[0].split(ATTENTION_BLOCK, dim=1)
    lengths = [block.shape[1] for block in queries]
    lengths[0] += seen - tokens
    keys, values = (x[0].split(lengths, dim=1) for x in (key, value))
    attended, row, width = [], 0, 0
    for number, block in enumerate(queries):
        width += lengths[number]
        limits = bias[row : row + block.shape[1], :width]
        row += block.shape[1]
        seen_keys, seen_values = (torch.cat(x[: number + 1], dim=1) for x in (keys, values))
        scores = torch.baddbmm(limits, block, seen_keys.transpose(1, 2), alpha=scale)  # [heads, block, width]
        attended.append(torch.bmm(scores.softmax(-1), seen_values))
    return torch.cat(attended, dim=1)[None]


AttentionInterface.register(TREE_ATTENTION, tree_attention)
