"""The forward pass of a Llama-like model over packed sequences, in as few operations as PyTorch's kernels allow.

Queries, keys and values come from one product, as do gate and up; the residual is added within the products that
produce it; queries and keys are rotated together, in place. In the last layer, the output projection and the MLP are
computed only at the rows that are read. It is for inference: its operations in place keep autograd from using it.

transformers' implementation of the same layers (Touvron et al. 2023) is the reference, with which tests compare.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.ranker.forward.attention import Attention, Sequences
from models.ranker.forward.float8 import Float8, product
from models.ranker.forward.rope import rotary_table, rotate
from models.ranker.forward.shape import ForwardShape
from models.ranker.forward.weights import Layer, Linear, Weights


@dataclass(frozen=True)
class Rows:
    """The rows of a pass: tokens of several sequences."""

    tokens: Tensor
    """Token ids [rows]."""
    positions: Tensor
    """Position of each token in its prompt [rows]."""
    places: Tensor
    """Rows whose states are read [reads]."""
    sequences: Sequences
    """The sequences."""
    keys: Tensor | None
    """Row of each key of the sequences [keys]; None if the rows are the keys."""


class Forward:
    """The layers of a model.

    Args:
        config: transformers' configuration of the model.
        shape: the model's shape.
        weights: its weights, all in one precision, or the matrices of its layers in fp8, and on one device.
        attention: the attention of that device.
    """

    def __init__(self, config: Any, shape: ForwardShape, weights: Weights, attention: Attention) -> None:
        self.shape = shape
        self.attention = attention
        self._weights = weights
        table = rotary_table(config, shape.positions).to(weights.norm.device, weights.norm.dtype)
        self._turns = table[:, :, None].contiguous()  # [positions, 2, 1, width]

    def __call__(self, rows: Rows) -> Tensor:
        """Return the hidden states at the rows that are read, normalised as the head expects them [reads, hidden]."""
        x = F.embedding(rows.tokens, self._weights.embedding)  # [rows, hidden]
        turn = self._turns.index_select(0, rows.positions)  # [rows, 2, 1, width]
        for number, layer in enumerate(self._weights.layers):
            attended = self._attend(layer, x, turn, rows)
            if number + 1 == self.shape.layers:
                x, attended = x.index_select(0, rows.places), attended.index_select(0, rows.places)
            add_product(x, attended, layer.output)
            gate, up = linear(self._norm(x, layer.mlp_norm), layer.gate_up).split(self.shape.inner, dim=1)
            add_product(x, F.silu(gate).mul_(up), layer.down)
        return self._norm(x, self._weights.norm)

    def _attend(self, layer: Layer, x: Tensor, turn: Tensor, rows: Rows) -> Tensor:
        """Return what each row attends to [rows, heads * width]."""
        heads, key_heads = self.shape.heads, self.shape.key_heads
        fused = linear(self._norm(x, layer.attention_norm), layer.qkv)
        fused = fused.view(-1, self.shape.fused_heads, self.shape.width)
        rotate(fused[:, : heads + key_heads], turn)
        seen = fused[:, heads:]  # [rows, 2 * key heads, width]
        if rows.keys is not None:
            seen = seen.index_select(0, rows.keys)
        attended = self.attention.attend(fused[:, :heads], seen[:, :key_heads], seen[:, key_heads:], rows.sequences)
        return attended.reshape(-1, heads * self.shape.width)

    def _norm(self, x: Tensor, scale: Tensor) -> Tensor:
        return F.rms_norm(x, (self.shape.hidden,), scale, self.shape.epsilon)


def linear(x: Tensor, by: Linear) -> Tensor:
    """Return the product of x [rows, in] with a linear map [rows, out]."""
    if isinstance(by.weight, Float8):
        return product(x, by.weight, by.bias)
    return F.linear(x, by.weight, by.bias)


def add_product(x: Tensor, inner: Tensor, by: Linear) -> None:
    """Add the product of ``inner`` [rows, in] with a linear map to x [rows, out], in place."""
    if isinstance(by.weight, Float8):
        x.add_(product(inner, by.weight, by.bias))
        return
    x.addmm_(inner, by.weight.t())
    if by.bias is not None:
        x.add_(by.bias)


def without_split_k() -> None:
    """Keep cuBLAS from splitting the sums of its products, for the whole process.

    How it splits them depends on the number of rows, and so on the prompts that share a pass. Sums of parts in reduced
    precision are turned off too.
    """
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = (False, False)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (False, False)
