"""Fuses a model's weights into the matrices that the forward multiplies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.ranker.forward.float8 import Float8, to_float8
from models.ranker.forward.shape import ForwardShape


@dataclass(frozen=True)
class Linear:
    """A linear map."""

    weight: Tensor | Float8
    """Weight [out, in]."""
    bias: Tensor | None
    """Bias [out]."""


@dataclass(frozen=True)
class Layer:
    """The weights of a layer."""

    attention_norm: Tensor
    """Scale of the norm before the attention [hidden]."""
    qkv: Linear
    """Map to queries, keys and values [fused heads * width, hidden]."""
    output: Linear
    """Map from the attended values [hidden, heads * width]."""
    mlp_norm: Tensor
    """Scale of the norm before the MLP [hidden]."""
    gate_up: Linear
    """Map to the MLP's gate and to what it multiplies [2 * inner, hidden]."""
    down: Linear
    """Map from the MLP's inner states [hidden, inner]."""


@dataclass(frozen=True)
class Weights:
    """The weights of a model without its head."""

    embedding: Tensor
    """State of each token id before the first layer [vocabulary, hidden]."""
    layers: Sequence[Layer]
    """The layers, the first one first."""
    norm: Tensor
    """Scale of the last norm [hidden]."""


def fuse(
    state: Mapping[str, Tensor],
    shape: ForwardShape,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    float8: bool = False,
) -> Weights:
    """Return a model's weights in a precision and on a device; one layer at a time is there twice.

    Args:
        state: the state dict of a causal language model of transformers.
        shape: the model's shape.
        dtype: precision of the weights.
        device: device of the weights.
        float8: whether the layers' matrices are rounded to fp8.
    """

    def weight(name: str) -> Tensor:
        return state[name].to(device, dtype)

    def linear(layer: str, *names: str) -> Linear:
        parts = [weight(f"{layer}.{name}.weight") for name in names]
        with_bias = f"{layer}.{names[0]}.bias" in state
        biases = [weight(f"{layer}.{name}.bias") for name in names] if with_bias else []
        joined = torch.cat(parts)
        return Linear(to_float8(joined) if float8 else joined, torch.cat(biases) if biases else None)

    def layer(name: str) -> Layer:
        return Layer(
            weight(f"{name}.input_layernorm.weight"),
            linear(name, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            linear(name, "self_attn.o_proj"),
            weight(f"{name}.post_attention_layernorm.weight"),
            linear(name, "mlp.gate_proj", "mlp.up_proj"),
            linear(name, "mlp.down_proj"),
        )

    return Weights(
        weight("model.embed_tokens.weight"),
        [layer(f"model.layers.{number}") for number in range(shape.layers)],
        weight("model.norm.weight"),
    )


def head_of(state: Mapping[str, Tensor], shape: ForwardShape) -> Tensor:
    """Return the head's rows, one for each token id, as they are stored [vocabulary, hidden]."""
    return state["model.embed_tokens.weight" if shape.tied else "lm_head.weight"]
