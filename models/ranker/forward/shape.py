"""Reads what the forward must know of a model from its configuration, and says which models it does not compute."""

from dataclasses import dataclass
from typing import Any

from preprocessing.errors import InputError

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles depend on the position alone; those of ``dynamic`` and ``longrope`` depend on the
prompt's length too, which differs between prompts that share a pass."""
KINDS = ("llama", "mistral", "qwen2")
"""Model types of transformers that consist of the layers that :mod:`models.ranker.forward.model` computes."""


class UnsupportedBaseError(InputError):
    """A model that the forward does not compute; transformers does."""


@dataclass(frozen=True)
class ForwardShape:
    """Sizes and constants of a Llama-like model."""

    vocabulary: int
    """Number of token ids."""
    hidden: int
    """Size of the hidden states."""
    inner: int
    """Size of the MLP's inner states."""
    layers: int
    """Number of layers."""
    heads: int
    """Number of query heads."""
    key_heads: int
    """Number of key and value heads, a divisor of ``heads``."""
    width: int
    """Size of a head."""
    positions: int
    """Number of positions in the model's context."""
    epsilon: float
    """Constant of the root mean square normalisation."""
    tied: bool
    """Whether the head is the embedding."""

    @property
    def fused_heads(self) -> int:
        """Number of heads of queries, keys and values together."""
        return self.heads + 2 * self.key_heads


def shape_of(config: Any) -> ForwardShape:
    """Return the shape of a model.

    Args:
        config: transformers' configuration of the model.

    Raises:
        UnsupportedBaseError: the forward does not compute such a model; the sentence names the first reason.
    """
    if reason := _reason(config):
        raise UnsupportedBaseError(f"the lean forward does not compute {config.model_type}: {reason}")
    heads = config.num_attention_heads
    return ForwardShape(
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=heads,
        key_heads=config.num_key_value_heads or heads,
        width=getattr(config, "head_dim", None) or config.hidden_size // heads,
        positions=config.max_position_embeddings,
        epsilon=config.rms_norm_eps,
        tied=config.tie_word_embeddings,
    )


def _reason(config: Any) -> str:
    """Return why the forward does not compute a model; empty if it does."""
    if config.model_type not in KINDS:
        return f"its layers are not those of {', '.join(KINDS[:-1])} or {KINDS[-1]}"
    if getattr(config, "quantization_config", None):
        return "its weights are quantised"
    if config.hidden_act not in ("silu", "swish"):
        return f"its activation is {config.hidden_act}, not silu"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        return f"its attention slides over {window} of {config.max_position_embeddings} positions"
    rope = config.rope_parameters
    if rope["rope_type"] not in ROPE_TYPES:
        return f"its rotary embedding is {rope['rope_type']}, not one of {', '.join(ROPE_TYPES)}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "its rotary embedding turns a part of each head only"
    return ""
