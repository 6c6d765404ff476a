"""Attention of independent lines in PyTorch, for every architecture that uses transformers' attention interface."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

LINES_ATTENTION = "independent_lines"
"""Name under which :func:`lines_attention` is registered with transformers."""
Layer = tuple[Tensor, Tensor]
"""Keys and values of the prefix in one layer [key heads, prefix, width]."""


@dataclass(frozen=True)
class PrefixPass:
    """A pass over the prefix, which collects the keys and values of each layer."""

    read: Tensor
    """Rows whose states are read: none [0]."""
    layers: list[Layer] = field(default_factory=list)


@dataclass(frozen=True)
class LinesPass:
    """A pass over a slab of lines; see :class:`models.ranker.inference.slabs.Slab`."""

    read: Tensor
    """Rows whose states are read: the lines' ends [lines]."""
    layers: Iterator[Layer]
    """The prefix's keys and values, which each layer takes in turn."""
    members: Tensor
    slots: Tensor


Part = PrefixPass | LinesPass


class LinesDecoder:
    """A decoder that computes prefixes and independent lines.

    Args:
        decoder: layers of transformers; their attention is replaced by :func:`lines_attention`, which leaves passes
            over whole prompts as they are.
    """

    def __init__(self, decoder: Any) -> None:
        for module in decoder.modules():
            if isinstance(config := getattr(module, "config", None), PreTrainedConfig):
                config._attn_implementation = LINES_ATTENTION
        self._decoder = decoder
        last = getattr(decoder, "layers", [None])[-1]
        self._narrows = type(last) is LlamaDecoderLayer
        if self._narrows:
            last.forward = partial(_last_layer, last, last.forward)

    def __call__(self, tokens: Tensor, positions: Tensor | None, part: Part) -> Tensor:
        """Return the normalised hidden states of the rows that are read [n, hidden].

        Args:
            tokens: token ids [rows].
            positions: position of each row in its prompt [rows]; without them, 0 and up.
            part: what the rows are.
        """
        given = {} if positions is None else {"position_ids": positions[None]}
        hidden: Tensor
        hidden = self._decoder(input_ids=tokens[None], use_cache=False, part=part, **given).last_hidden_state[0]
        return hidden if self._narrows else hidden[part.read]


def _last_layer(
    layer: Any, whole: Callable[..., Tensor], hidden: Tensor, *, part: Part | None = None, **given: Any
) -> Tensor:
    """Return the output of Llama's last layer [1, n, hidden], whose MLP is computed only for the rows that are read."""
    if part is None:
        return whole(hidden, **given)
    attended, _ = layer.self_attn(layer.input_layernorm(hidden), part=part, **given)
    read = (hidden + attended)[:, part.read]
    output: Tensor = read + layer.mlp(layer.post_attention_layernorm(read))
    return output


def lines_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    part: Part | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return the attention over a prefix or over the lines that continue it; without ``part``, transformers' own.

    Args:
        module: the attention layer.
        query: queries [1, heads, rows, width].
        key: keys [1, key heads, rows, width].
        value: values [1, key heads, rows, width].
        attention_mask: the mask of a whole prompt; unused with ``part``.
        part: what the pass is over.
        scaling: factor of the dot products.
        kwargs: other arguments that transformers passes to every attention function.

    Returns:
        the attended values [1, rows, heads, width], and None in place of the attention weights.
    """
    if isinstance(part, LinesPass):
        past_key, past_value = next(part.layers)
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        attended = attend(query[0] * scale, key[0], value[0], past_key, past_value, part.members, part.slots)
        return attended.transpose(0, 1)[None], None
    if part is not None:
        part.layers.append((key[0].contiguous(), value[0].contiguous()))
        attention_mask = None
    whole: tuple[Tensor, None]
    whole = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return whole


def attend(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, members: Tensor, slots: Tensor
) -> Tensor:
    """Return what each row of a slab attends to: the prefix, and its own line up to itself.

    The softmax runs over the prefix's keys and then those of the row's line, which stand at the same places whatever
    else the slab holds. Query heads that share a key head are rows of one product.

    Args:
        query: scaled queries [heads, rows, width].
        key: keys [key heads, rows, width].
        value: values [key heads, rows, width].
        past_key: the prefix's keys [key heads, prefix, width].
        past_value: the prefix's values [key heads, prefix, width].
        members: row of each token of each line [lines, line].
        slots: place of each row in the flattened ``members`` [rows].

    Returns:
        the attended values [heads, rows, width].
    """
    heads, key_heads, rows, prefix = len(query), len(key), query.shape[1], past_key.shape[1]
    count, line = members.shape
    flat, grid = members.flatten(), (key_heads, heads // key_heads, count, line)
    queries = query[:, flat].view(*grid, -1)
    keys, values = (x[:, flat].view(key_heads, 1, count, line, -1) for x in (key, value))
    causal = torch.ones(line, line, dtype=torch.bool, device=query.device).tril()
    own = (queries @ keys.transpose(3, 4)).masked_fill(~causal, -torch.inf)  # [key heads, group, lines, line, line]
    own = own.view(heads, count * line, line)[:, slots].view(key_heads, -1, line)  # [key heads, group * rows, line]
    theirs = query.reshape(key_heads, -1, query.shape[2]) @ past_key.transpose(1, 2)
    weights = torch.cat([theirs, own], dim=2).float().softmax(-1).to(query.dtype)
    own = weights[:, :, prefix:].reshape(heads, rows, line)[:, flat].view(*grid, line) @ values
    theirs = weights[:, :, :prefix] @ past_value  # [key heads, group * rows, width]
    return theirs.view(heads, rows, -1) + own.view(heads, count * line, -1)[:, slots]


AttentionInterface.register(LINES_ATTENTION, lines_attention)
