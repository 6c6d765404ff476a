"""Attention over packed sequences of several lengths, on a GPU and on a processor.

Each sequence has queries and keys of its own, and the last query sees all of its keys, the one before it all but the
last, and so on (causal, aligned at the bottom right). A whole prompt is a sequence whose queries and keys are its
tokens. A line that continues a prefix is a sequence whose queries are the line's tokens and whose keys are those of the
prefix and of the line: together they are the tree mask of :mod:`models.ranker.fitting.packing`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

try:
    from torch.nn.attention.varlen import varlen_attn

    PARAMETERS = frozenset(inspect.signature(varlen_attn).parameters)
except ImportError:  # PyTorch before 2.10
    PARAMETERS = frozenset()

KERNEL = "window_size" in PARAMETERS
"""Whether this PyTorch has a variable-length kernel that aligns at the bottom right; 2.11 has."""
GROUPED = "enable_gqa" in PARAMETERS
"""Whether its function lets several query heads share a key head; 2.12 does."""
FUSED = (torch.float16, torch.bfloat16)
"""Precisions that the variable-length kernel computes in."""


@dataclass(frozen=True)
class Sequences:
    """Where the sequences of a pass begin and end. Sequences may be empty."""

    queries: Tensor
    """First query of each sequence and the end of the last [sequences + 1], int32."""
    keys: Tensor
    """First key of each sequence and the end of the last [sequences + 1], int32."""
    longest: int
    """Maximum number of a sequence's keys that the pass allows, which chooses the kernel's grid."""


Attend = Callable[[Tensor, Tensor, Tensor, Sequences], Tensor]
"""Maps queries [rows, heads, width], keys and values [keys, key heads, width] to attended values [rows, heads, width].
"""


@dataclass(frozen=True)
class Attention:
    """A way to compute the attention."""

    attend: Attend
    """The computation."""
    captures: bool
    """Whether a CUDA graph can contain it: it does not read the sequences' lengths on the processor."""


def attention_for(device: torch.device, dtype: torch.dtype, width: int) -> Attention:
    """Return the attention of a device: the variable-length kernel in fp16 and bf16 on a GPU, else its twin.

    Args:
        device: the device.
        dtype: precision of the layers.
        width: size of a head; the kernel computes multiples of 8 up to 256.
    """
    if device.type == "cuda" and dtype in FUSED and KERNEL and width % 8 == 0 and width <= 256:
        return Attention(attend_with_kernel, captures=True)
    return Attention(attend_by_sequence, captures=False)


def attend_with_kernel(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences) -> Tensor:
    """Return the attended values, computed by PyTorch's variable-length attention; see :data:`Attend`."""
    given: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if GROUPED:
            given["enable_gqa"] = True
        else:
            group = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    ends, longest = (sequences.queries, sequences.keys), (sequences.longest, sequences.longest)
    attended = varlen_attn(query, key, value, *ends, *longest, window_size=(-1, 0), **given)
    assert isinstance(attended, Tensor)  # more is returned only if it is asked for
    return attended


def attend_by_sequence(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences) -> Tensor:
    """Return the attended values, computed sequence by sequence; see :data:`Attend`.

    What a sequence attends to is computed from its queries and keys alone, so it does not depend on the others.
    """
    attended = torch.zeros_like(query)
    queries, keys = sequences.queries.tolist(), sequences.keys.tolist()
    for number in range(len(queries) - 1):
        (first, last), (begin, end) = queries[number : number + 2], keys[number : number + 2]
        if first == last:
            continue
        count, seen = last - first, end - begin
        mask = None
        if count != seen:
            mask = torch.ones(count, seen, dtype=torch.bool, device=query.device).tril(seen - count)
        part = scaled_dot_product_attention(
            query[first:last].transpose(0, 1)[None],
            key[begin:end].transpose(0, 1)[None],
            value[begin:end].transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # [1, heads, count, width]
        attended[first:last] = part[0].transpose(0, 1)
    return attended
