"""The merged ranker in OpenVINO: Llama's layers as one graph, straight from the safetensors, without torch.

Above the last layer's keys and values only the places that are read are computed: nothing else reaches the scores.
Source of the architecture: Touvron et al. 2023; of the rotary halves: transformers' Llama, with which a test compares.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray
from openvino import opset13 as op
from safetensors import safe_open

from models.ranker.scoring import Runtime, Scorer
from preprocessing.errors import InputError

Weight = Callable[[str], NDArray[Any]]
PRECISION = {"float32": "f32", "bfloat16": "bf16"}


class OpenVinoScorer(Scorer):
    """See :class:`models.ranker.scoring.Scorer`."""

    def __init__(self, folder: Path, runtime: Runtime) -> None:
        """Args: see :func:`models.ranker.scoring.load_scorer`.

        Raises:
            InputError: the model has a feature of Llama that the graph has not.
        """
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weight = weights_of(folder)
        head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
        self._head = weight(head)  # [vocabulary, hidden], as stored
        self._compiled = openvino.Core().compile_model(
            hidden_states(config, weight),
            "CPU",
            {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": runtime.threads,
                "INFERENCE_PRECISION_HINT": PRECISION[runtime.dtype],
                # Pinned, the threads of every instance of the ranker would share the first cores.
                "ENABLE_CPU_PINNING": False,
            },
        )

    def rows(self, label_ids: Sequence[int]) -> NDArray[np.float32]:
        """See :class:`models.ranker.scoring.Scorer`."""
        rows: NDArray[np.float32] = self._head[list(label_ids)].astype(np.float32)
        return rows

    def states(self, token_ids: Sequence[int], places: Sequence[int]) -> NDArray[np.float32]:
        """See :class:`models.ranker.scoring.Scorer`."""
        states: NDArray[np.float32] = self._compiled([np.asarray(token_ids, np.int64), np.asarray(places, np.int64)])[0]
        return states


def weights_of(folder: Path) -> Weight:
    """Reads tensors of a Hugging Face folder by name, whichever shard they are in."""
    files: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file: Any = safe_open(path, "numpy")
        files.update(dict.fromkeys(file.keys(), file))

    def weight(name: str) -> NDArray[Any]:
        tensor: NDArray[Any] = files[name].get_tensor(name)
        return tensor

    return weight


def hidden_states(config: dict[str, Any], weight: Weight) -> openvino.Model:
    """The graph from token ids [length] and places [n] among them to the normalised states there [n, hidden].

    Args:
        config: of the Hugging Face folder.
        weight: gives the folder's tensors.

    Raises:
        InputError: another architecture, biases, or rotary embeddings that are scaled.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    biases = config.get("attention_bias") or config.get("mlp_bias")
    scaled = rope.get("rope_type", "default") != "default"
    if config["architectures"] != ["LlamaForCausalLM"] or biases or scaled:
        raise InputError(
            "OpenVINO runs LlamaForCausalLM without biases and rope scaling only: export with --runtime torch"
        )
    eps = config["rms_norm_eps"]
    tokens, places = (op.parameter([-1], np.int64, name=name) for name in ("tokens", "places"))
    x = op.gather(_constant(weight("model.embed_tokens.weight")), tokens, np.int64(0))  # [length, hidden]
    attention = _Attention(config, op.shape_of(tokens))
    layers = config["num_hidden_layers"]
    for number in range(layers):
        read = places if number + 1 == layers else None
        x = _layer(x, partial(_weight_of_layer, weight, number), attention, eps, read)
    x = _norm(x, weight("model.norm.weight"), eps)
    return openvino.Model([x], [tokens, places], "llama")


def _weight_of_layer(weight: Weight, number: int, name: str) -> NDArray[Any]:
    return weight(f"model.layers.{number}.{name}.weight")


def _layer(x: Any, weight: Weight, attention: "_Attention", eps: float, places: Any) -> Any:
    """One decoder layer over [length, hidden]; with ``places``, no others than they are given [n, hidden]."""
    normed = _norm(x, weight("input_layernorm"), eps)
    if places is not None:
        x = op.gather(x, places, np.int64(0))  # [n, hidden]
    x = op.add(x, _linear(attention(normed, weight, places), weight("self_attn.o_proj")))
    normed = _norm(x, weight("post_attention_layernorm"), eps)
    gate = op.swish(_linear(normed, weight("mlp.gate_proj")))
    return op.add(x, _linear(op.multiply(gate, _linear(normed, weight("mlp.up_proj"))), weight("mlp.down_proj")))


class _Attention:
    """Causal attention with rotary positions, several query heads to a key head."""

    def __init__(self, config: dict[str, Any], length: Any) -> None:
        self.heads, self.key_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.width = config.get("head_dim") or config["hidden_size"] // self.heads
        theta = (config.get("rope_parameters") or {}).get("rope_theta") or config["rope_theta"]
        frequencies = 1.0 / theta ** (np.arange(0, self.width, 2, dtype=np.float64) / self.width)
        angles = np.outer(np.arange(config["max_position_embeddings"]), np.tile(frequencies, 2))  # [context, width]
        self.cos, self.sin = (
            op.slice(op.constant(table[None, None].astype(np.float32)), [0], length, [1], [2])
            for table in (np.cos(angles), np.sin(angles))
        )  # [1, 1, length, width]
        self.positions = op.range(np.int64(0), op.squeeze(length, np.int64(0)), np.int64(1), "i64")  # [length]

    def __call__(self, x: Any, weight: Weight, places: Any) -> Any:
        """[length, hidden] -> [length, heads * width], or [n, heads * width] of the places only."""
        query = self._rotate(self._split(_linear(x, weight("self_attn.q_proj")), self.heads))
        key = self._repeat(self._rotate(self._split(_linear(x, weight("self_attn.k_proj")), self.key_heads)))
        value = self._repeat(self._split(_linear(x, weight("self_attn.v_proj")), self.key_heads))
        if places is None:
            attended = op.scaled_dot_product_attention(query, key, value, causal=True)  # [1, heads, length, width]
        else:
            before = op.less_equal(self.positions, op.unsqueeze(places, np.int64(1)))  # [n, length]
            attended = op.scaled_dot_product_attention(op.gather(query, places, np.int64(2)), key, value, before)
        merged = op.transpose(attended, np.array([0, 2, 1, 3]))
        return op.reshape(merged, np.array([-1, self.heads * self.width]), special_zero=False)

    def _split(self, x: Any, heads: int) -> Any:
        """[length, heads * width] -> [1, heads, length, width]."""
        return op.transpose(op.reshape(x, np.array([1, -1, heads, self.width]), False), np.array([0, 2, 1, 3]))

    def _rotate(self, x: Any) -> Any:
        first, second = op.split(x, np.int64(3), 2).outputs()
        turned = op.concat([op.negative(second), first], 3)
        return op.add(op.multiply(x, self.cos), op.multiply(turned, self.sin))

    def _repeat(self, x: Any) -> Any:
        """[1, key heads, length, width] -> [1, heads, length, width]."""
        if self.heads == self.key_heads:
            return x
        each = op.broadcast(
            op.unsqueeze(x, np.int64(2)),
            np.array([1, 1, self.heads // self.key_heads, 1, 1]),
            broadcast_spec="BIDIRECTIONAL",
        )
        return op.reshape(each, np.array([1, self.heads, -1, self.width]), False)


def _constant(array: NDArray[Any]) -> Any:
    return op.convert(op.constant(array), "f32")


def _linear(x: Any, weight: NDArray[Any]) -> Any:
    return op.matmul(x, _constant(weight), False, True)


def _norm(x: Any, weight: NDArray[Any], eps: float) -> Any:
    """Root mean square normalisation (Zhang and Sennrich 2019)."""
    mean_square = op.reduce_mean(op.power(x, np.float32(2)), np.array([-1]), True)
    scale = op.divide(np.float32(1), op.sqrt(op.add(mean_square, np.float32(eps))))
    return op.multiply(op.multiply(x, scale), _constant(weight))
