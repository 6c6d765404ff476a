"""Tabulates the rotary embedding of every position."""

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


def rotary_table(config: Any, positions: int) -> Tensor:
    """Return cosine and signed sine of the rotary angles in fp32 [positions, 2, width].

    transformers computes the frequencies, so scaled embeddings (linear, llama3, yarn) are those of the model. The sine
    of a head's first half is negative: with it, the rotation of x is ``x * cosine + swapped(x) * sine``, where
    ``swapped`` exchanges the halves of each head.

    Args:
        config: transformers' configuration of the model.
        positions: number of positions.
    """
    rotary = LlamaRotaryEmbedding(config)
    cosine, sine = rotary(torch.empty(0), torch.arange(positions)[None])  # each [1, positions, width]
    half = sine.shape[-1] // 2
    signed = torch.cat([-sine[..., :half], sine[..., half:]], dim=-1)
    return torch.stack([cosine[0], signed[0]], dim=1)


def rotate(x: Tensor, turn: Tensor) -> None:
    """Rotate heads in place.

    Args:
        x: heads [rows, heads, width], which may be a view.
        turn: the table's rows at their positions [rows, 2, 1, width].
    """
    half = x.shape[-1] // 2
    swapped = torch.cat([x[..., half:], x[..., :half]], dim=-1)
    x.mul_(turn[:, 0]).addcmul_(swapped, turn[:, 1])
