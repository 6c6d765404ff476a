"""Builds Llama's layers as one OpenVINO graph from the safetensors, without torch.

Beyond the last layer's keys and values, only the positions that are read are computed: nothing else affects the scores.
OpenVINO has fast kernels for subgraphs of a certain form: rotary embeddings, attention with a cache of keys and values,
and for some widths the whole feed-forward block, whose tensors must have three dimensions.
Source of the architecture: Touvron et al. 2023; of the rotary halves: transformers' Llama, with which a test compares.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray
from openvino import opset6
from openvino import opset13 as op
from openvino.op.util import Variable, VariableInfo
from safetensors import safe_open

Weight = Callable[[str], NDArray[Any]]


def weights_of(folder: Path) -> Weight:
    """Return a function that reads a tensor of a Hugging Face folder by name, whichever shard it is in."""
    files: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file: Any = safe_open(path, "numpy")
        files.update(dict.fromkeys(file.keys(), file))

    def weight(name: str) -> NDArray[Any]:
        tensor: NDArray[Any] = files[name].get_tensor(name)
        return tensor

    return weight


def hidden_states(config: dict[str, Any], weight: Weight, cached: bool = False) -> openvino.Model:
    """Return the graph from token ids [length] and positions [n] to the normalised hidden states there [n, hidden].

    Args:
        config: configuration of a Hugging Face folder that OpenVINO runs, see
            :func:`models.ranker.inference.openvino_support.openvino_runs`.
        weight: function that returns a tensor of the folder by name.
        cached: whether to add a cache of keys and values. It serves only to select OpenVINO's attention kernel for
            cached models, which is faster in bf16 and slower in fp32 (docs/results/ranker.md). Resetting the request's
            state before each prompt empties it.
    """
    eps = config["rms_norm_eps"]
    tokens, places = (op.parameter([-1], np.int64, name=name) for name in ("tokens", "places"))
    x = op.gather(constant(weight("model.embed_tokens.weight")), tokens, np.int64(0))  # [length, hidden]
    x = op.unsqueeze(x, np.int64(0))  # [1, length, hidden]
    beam = op.parameter([-1], np.int32, name="beam") if cached else None  # [1]: 0, the index of the only sequence
    attention = _Attention(config, op.shape_of(tokens), beam)
    layers = config["num_hidden_layers"]
    for number in range(layers):
        read = places if number + 1 == layers else None
        x = _layer(x, partial(weight_of_layer, weight, number), attention, eps, read)
    x = op.squeeze(norm(x, weight("model.norm.weight"), eps), np.int64(0))  # [n, hidden]
    inputs = [tokens, places, beam] if cached else [tokens, places]
    return openvino.Model([x.output(0)], attention.kept, inputs, "llama")


def weight_of_layer(weight: Weight, number: int, name: str) -> NDArray[Any]:
    """Return the weight of this name in a layer."""
    return weight(f"model.layers.{number}.{name}.weight")


def _layer(x: Any, weight: Weight, attention: "_Attention", eps: float, places: Any) -> Any:
    """Return a decoder layer's output for x [1, length, hidden]; with ``places``, at those alone [1, n, hidden]."""
    normed = norm(x, weight("input_layernorm"), eps)
    if places is not None:
        x = op.gather(x, places, np.int64(1))  # [1, n, hidden]
    x = op.add(x, linear(attention(normed, weight, places), weight("self_attn.o_proj")))
    normed = norm(x, weight("post_attention_layernorm"), eps)
    return op.add(x, feed_forward(normed, weight))


def feed_forward(x: Any, weight: Weight) -> Any:
    """Return the output of the MLP for x [1, length, hidden]."""
    gate = op.swish(linear(x, weight("mlp.gate_proj")))
    return linear(op.multiply(gate, linear(x, weight("mlp.up_proj"))), weight("mlp.down_proj"))


class _Attention:
    """Causal attention with rotary positions, in which several query heads may share a key head."""

    def __init__(self, config: dict[str, Any], length: Any, beam: Any) -> None:
        self.beam = beam
        self.kept: list[Any] = []
        """Nodes that write the cache."""
        self.heads, self.key_heads, self.width = attention_shape(config)
        self.cos, self.sin = (
            op.slice(op.constant(table[None, None]), [0], length, [1], [2]) for table in rotary_tables(config)
        )  # [1, 1, length, width]
        self.positions = op.range(np.int64(0), op.squeeze(length, np.int64(0)), np.int64(1), "i64")  # [length]

    def __call__(self, x: Any, weight: Weight, places: Any) -> Any:
        """Map x [1, length, hidden] to [1, length, heads * width], or to [1, n, heads * width] at ``places`` alone."""
        query = rotate(split_heads(linear(x, weight("self_attn.q_proj")), self.heads, self.width), self.cos, self.sin)
        key = rotate(split_heads(linear(x, weight("self_attn.k_proj")), self.key_heads, self.width), self.cos, self.sin)
        value = split_heads(linear(x, weight("self_attn.v_proj")), self.key_heads, self.width)
        if self.beam is not None and places is None:
            key, value = self._cache(key), self._cache(value)
        key, value = self._repeat(key), self._repeat(value)
        if places is None:
            attended = op.scaled_dot_product_attention(query, key, value, causal=True)  # [1, heads, length, width]
        else:
            before = op.less_equal(self.positions, op.unsqueeze(places, np.int64(1)))  # [n, length]
            attended = op.scaled_dot_product_attention(op.gather(query, places, np.int64(2)), key, value, before)
        merged = op.transpose(attended, np.array([0, 2, 1, 3]))
        return op.reshape(merged, np.array([1, -1, self.heads * self.width]), special_zero=False)

    def _cache(self, x: Any) -> Any:
        """Return the cache's content followed by x [1, key heads, length, width], in the form OpenVINO recognises."""
        facts = VariableInfo()
        facts.data_shape = openvino.PartialShape([-1, self.key_heads, -1, self.width])
        facts.data_type = openvino.Type.f32
        facts.variable_id = f"cache {len(self.kept)}"
        variable = Variable(facts)
        empty = op.constant(np.zeros((1, self.key_heads, 0, self.width), np.float32))
        before = op.gather(opset6.read_value(empty, variable), self.beam, np.int64(0))
        cache = op.concat([before, x], 2)
        self.kept.append(opset6.assign(cache, variable))
        return cache

    def _repeat(self, x: Any) -> Any:
        """Repeat key heads for the query heads that share them: [1, key heads, ...] to [1, heads, length, width]."""
        if self.heads == self.key_heads:
            return x
        each = op.broadcast(
            op.unsqueeze(x, np.int64(2)),
            np.array([1, 1, self.heads // self.key_heads, 1, 1]),
            broadcast_spec="BIDIRECTIONAL",
        )
        return op.reshape(each, np.array([1, self.heads, -1, self.width]), False)


def attention_shape(config: dict[str, Any]) -> tuple[int, int, int]:
    """Return the number of query heads, the number of key heads, and the width of a head."""
    heads = config["num_attention_heads"]
    return heads, config["num_key_value_heads"], config.get("head_dim") or config["hidden_size"] // heads


def rotary_tables(config: dict[str, Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return cosine and sine of the rotary angles at each position [context, width]."""
    width = attention_shape(config)[2]
    theta = (config.get("rope_parameters") or {}).get("rope_theta") or config["rope_theta"]
    frequencies = 1.0 / theta ** (np.arange(0, width, 2, dtype=np.float64) / width)
    angles = np.outer(np.arange(config["max_position_embeddings"]), np.tile(frequencies, 2))  # [context, width]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def split_heads(x: Any, heads: int, width: int) -> Any:
    """Map [1, length, heads * width] to [1, heads, length, width]."""
    return op.transpose(op.reshape(x, np.array([1, -1, heads, width]), False), np.array([0, 2, 1, 3]))


def rotate(x: Any, cos: Any, sin: Any) -> Any:
    """Return x [1, heads, length, width] after the rotary embedding; the tables are [1, 1, length, width]."""
    width = x.get_output_partial_shape(0)[3].get_length()
    first, second = op.variadic_split(x, np.int64(3), np.array([width // 2] * 2)).outputs()
    turned = op.concat([op.multiply(second, np.float32(-1)), first], -1)
    return op.add(op.multiply(x, cos), op.multiply(turned, sin))


def constant(array: NDArray[Any]) -> Any:
    """Return a weight as a node in fp32; it stays in memory as it is stored."""
    return op.convert(op.constant(array), "f32")


def linear(x: Any, weight: NDArray[Any]) -> Any:
    """Return the product of x [..., in] with a weight [out, in]."""
    return op.matmul(x, constant(weight), False, True)


def norm(x: Any, weight: NDArray[Any], eps: float) -> Any:
    """Return x after root mean square normalisation (Zhang and Sennrich 2019)."""
    mean_square = op.reduce_mean(op.power(x, np.float32(2)), np.array([-1]), True)
    scale = op.divide(np.float32(1), op.sqrt(op.add(mean_square, np.float32(eps))))
    return op.multiply(op.multiply(x, scale), constant(weight))
