"""Packs several prompts into one forward pass: without padding, and with common prefixes computed once.

Prompts become a tree of segments. A token attends to its own segment up to itself and to the segments above it, which
are exactly the tokens before it in its prompt, at the same positions. Loss and gradients therefore equal those of the
prompts one by one. Candidate pools of one history share the instruction and the history; histories of which one
continues the other share their common part.

Source: tree attention as in Miao et al. 2024 (SpecInfer, section 5.1), used for training.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from models.device import sent
from models.ranker.forward.attention import Attend, Sequences, attention_for
from preprocessing.errors import InputError

TREE_ATTENTION = "prompt_tree"
"""Name under which :func:`tree_attention` is registered with transformers."""
SHORTEST_SHARED = 16
"""Minimum length in tokens of a shared prefix; a shorter segment costs more than it saves."""

ATTENTION_BLOCK = 128
"""Number of tokens whose attention is computed at once in bf16 on a processor."""


@dataclass(frozen=True)
class Segment:
    """A run of tokens in the packed sequence, with the segments that precede it in its prompts."""

    start: int
    end: int
    above: tuple[tuple[int, int], ...]
    """Start and end of each segment above, from the root."""
    device: torch.device

    @cached_property
    def mask(self) -> Tensor | None:
        """Mask [tokens, tokens above and own], True where a token attends.

        It is None, which means causal, without segments above.
        """
        if not self.above:
            return None
        own, depth = self.end - self.start, sum(end - start for start, end in self.above)
        return torch.ones(own, depth + own, dtype=torch.bool, device=self.device).tril(depth)


@dataclass(frozen=True)
class Gathered:
    """The segments as sequences of queries, and of keys that are gathered: those above and their own."""

    sequences: Sequences
    keys: Tensor
    """Place in the packed sequence of each key [keys]."""


@dataclass(frozen=True)
class PackedPrompts:
    """Token sequences packed into one sequence without padding."""

    tokens: Tensor
    """Token ids [1, total]."""
    positions: Tensor
    """Position of each token in its own prompt [1, total]."""
    segments: tuple[Segment, ...]
    places: tuple[NDArray[np.int64], ...]
    """For each prompt, in the given order, the index of each of its tokens in the packed sequence."""

    @cached_property
    def gathered(self) -> Gathered:
        """The keys of all segments, for an attention that computes them at once."""
        parts = [
            np.concatenate([np.arange(*part) for part in (*segment.above, (segment.start, segment.end))])
            for segment in self.segments
        ]
        ends = np.zeros((2, len(parts) + 1), np.int32)
        ends[0, 1:] = [segment.end for segment in self.segments]
        ends[1, 1:] = np.cumsum([len(part) for part in parts])
        queries, keys = sent(torch.from_numpy(ends), self.tokens.device)
        rows = sent(torch.from_numpy(np.concatenate(parts)), self.tokens.device)
        return Gathered(Sequences(queries, keys, max(map(len, parts))), rows)


def pack(prompts: Sequence[Sequence[int]], device: torch.device | str = "cpu", *, share: bool = True) -> PackedPrompts:
    """Return token sequences packed into one.

    Args:
        prompts: token ids of each prompt; no prompt may be empty.
        device: device of the tensors.
        share: whether common prefixes are computed only once.
    """
    device = torch.device(device)
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
            segments.append(Segment(start, end, above, device))
            for row in group:
                places[row].append(np.arange(start, end))
            if longer := [row for row in group if len(prompts[row]) > common]:
                grow(longer, common, (*above, (start, end)))

    grow(order, 0, ())
    return PackedPrompts(
        sent(torch.tensor([tokens]), device),
        sent(torch.tensor([positions]), device),
        tuple(segments),
        tuple(np.concatenate(parts) for parts in places),
    )


def _alike(prompts: Sequence[Sequence[int]], rows: Sequence[int], depth: int) -> Iterator[list[int]]:
    """Return groups of neighbours in sorted order with the same :data:`SHORTEST_SHARED` tokens from ``depth`` on."""

    def beginning(row: int) -> tuple[int, ...]:
        return tuple(prompts[row][depth : depth + SHORTEST_SHARED])

    return (list(group) for _, group in groupby(rows, beginning))


def _common_length(first: Sequence[int], last: Sequence[int]) -> int:
    """Return the length of the common prefix of two sequences, which all sequences sorted between them share."""
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def tree_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: PackedPrompts | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return the attention over packed prompts; without ``packed``, transformers' own attention over one prompt.

    Args:
        module: the attention layer.
        query: queries [1, heads, total, width].
        key: keys [1, key heads, total, width].
        value: values [1, key heads, total, width].
        attention_mask: None.
        packed: the packed prompts.
        scaling: factor of the dot products.
        kwargs: other arguments that transformers passes to every attention function.

    Returns:
        the attended values [1, total, heads, width], and None in place of the attention weights.

    Raises:
        InputError: the model caps its attention scores.
    """
    if kwargs.get("softcap") is not None:
        raise InputError(f"{type(module).__name__} caps its attention scores: choose a base such as Llama 2")
    if packed is None:
        whole: tuple[Tensor, None]
        whole = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return whole
    if attend := attends_at_once(query, scaling):
        return _attend_at_once(attend, query, key, value, packed.gathered), None
    segments = packed.segments
    groups = getattr(module, "num_key_value_groups", 1)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    # Split, not sliced: the gradient of each slice would be a tensor of the whole packed length, and adding them up
    # would take most of the attention's time.
    lengths = [segment.end - segment.start for segment in segments]
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    numbers = {segment.start: number for number, segment in enumerate(segments)}
    attended = []
    for number, segment in enumerate(segments):
        seen = [*(numbers[start] for start, _ in segment.above), number]
        seen_keys, seen_values = (torch.cat([x[row] for row in seen], dim=2) for x in (keys, values))
        attended.append(_attend(queries[number], seen_keys, seen_values, segment.mask, scaling))
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous(), None


def attends_at_once(query: Tensor, scaling: float | None) -> Attend | None:
    """Return the variable-length kernel, if it computes such queries [1, heads, total, width] here with this factor."""
    width = query.shape[3]
    attention = attention_for(query.device, query.dtype, width)
    return attention.attend if attention.captures and scaling in (None, width**-0.5) else None


def _attend_at_once(attend: Attend, query: Tensor, key: Tensor, value: Tensor, given: Gathered) -> Tensor:
    """Return the attended values [1, total, heads, width] of all segments.

    A key of a shared prefix is gathered for each segment below. An embedding's gradient sums up in fp32 and in a fixed
    order; that of a selection of rows would sum up in the precision of the layers and in any order.
    """
    queries = query[0].transpose(0, 1)  # [total, heads, width]
    rows = torch.stack((key[0], value[0])).permute(2, 0, 1, 3)  # [total, 2, key heads, width]
    seen = embedding(given.keys, rows.flatten(1)).unflatten(1, rows.shape[1:])  # [keys, 2, key heads, width]
    return attend(queries, seen[:, 0], seen[:, 1], given.sequences)[None]


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Return the attended values [1, heads, tokens, width]; the attention is causal without a mask."""
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling)
    # PyTorch's fused attention makes little use of the processor's bf16 instructions; plain matrix products are faster,
    # forward and backward. Blocks of queries skip the keys after them, which is close to half of the products.
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
