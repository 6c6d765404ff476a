"""The merged ranker in OpenVINO: Llama's layers as one graph, straight from the safetensors, without torch.

Above the last layer's keys and values only the places that are read are computed: nothing else reaches the scores.
OpenVINO has fast kernels for parts that it recognises by their form: rotary embeddings, attention with a cache of keys
and values, and for some widths the whole feed-forward block, which it wants in three dimensions.
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
from openvino import opset6
from openvino import opset13 as op
from openvino.op.util import Variable, VariableInfo
from safetensors import safe_open

from models.ranker.inference.scorer import Runtime, Scorer
from preprocessing.errors import InputError

Weight = Callable[[str], NDArray[Any]]
PRECISION = {"float32": "f32", "bfloat16": "bf16"}


class OpenVinoScorer(Scorer):
    """See :class:`models.ranker.inference.scorer.Scorer`."""

    def __init__(self, folder: Path, runtime: Runtime) -> None:
        """Args: see :func:`models.ranker.inference.runtimes.load_scorer`.

        Raises:
            InputError: the model has a feature of Llama that the graph has not.
        """
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weight = weights_of(folder)
        head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
        self._head = weight(head)  # [vocabulary, hidden], as stored
        cached = runtime.dtype == "bfloat16"
        compiled = openvino.Core().compile_model(
            hidden_states(config, weight, cached),
            "CPU",
            {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": runtime.threads,
                "INFERENCE_PRECISION_HINT": PRECISION[runtime.dtype],
                # Its default rounds to 8 bits.
                **({"KV_CACHE_PRECISION": PRECISION[runtime.dtype]} if cached else {}),
                # Kernels of the prompt lengths that were used last. The default has room for more lengths than there
                # are, at megabytes each: a server would grow for days. Made anew they take a part of one pass.
                "CPU_RUNTIME_CACHE_CAPACITY": 256,
                # Pinned, the threads of every instance of the ranker would share the first cores.
                "ENABLE_CPU_PINNING": False,
            },
        )
        self._request = compiled.create_infer_request()
        self._beam = [np.zeros(1, np.int32)] if cached else []

    def rows(self, label_ids: Sequence[int]) -> NDArray[np.float32]:
        """See :class:`models.ranker.inference.scorer.Scorer`."""
        rows: NDArray[np.float32] = self._head[list(label_ids)].astype(np.float32)
        return rows

    def states(self, token_ids: Sequence[int], places: Sequence[int]) -> NDArray[np.float32]:
        """See :class:`models.ranker.inference.scorer.Scorer`."""
        self._request.reset_state()
        found = self._request.infer([np.asarray(token_ids, np.int64), np.asarray(places, np.int64), *self._beam])
        states: NDArray[np.float32] = found[0]
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


def hidden_states(config: dict[str, Any], weight: Weight, cached: bool = False) -> openvino.Model:
    """The graph from token ids [length] and places [n] among them to the normalised states there [n, hidden].

    Args:
        config: of the Hugging Face folder.
        weight: gives the folder's tensors.
        cached: with a cache of keys and values, which is empty before each prompt if the request's state is reset: not
            for what it holds but for the attention that comes with it, which is faster in bf16 and slower in fp32
            (docs/results/ranker.md).

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
    x = op.unsqueeze(x, np.int64(0))  # [1, length, hidden]
    beam = op.parameter([-1], np.int32, name="beam") if cached else None  # [1]: 0, the only sequence there is
    attention = _Attention(config, op.shape_of(tokens), beam)
    layers = config["num_hidden_layers"]
    for number in range(layers):
        read = places if number + 1 == layers else None
        x = _layer(x, partial(_weight_of_layer, weight, number), attention, eps, read)
    x = op.squeeze(_norm(x, weight("model.norm.weight"), eps), np.int64(0))  # [n, hidden]
    inputs = [tokens, places, beam] if cached else [tokens, places]
    return openvino.Model([x.output(0)], attention.kept, inputs, "llama")


def _weight_of_layer(weight: Weight, number: int, name: str) -> NDArray[Any]:
    return weight(f"model.layers.{number}.{name}.weight")


def _layer(x: Any, weight: Weight, attention: "_Attention", eps: float, places: Any) -> Any:
    """One decoder layer over [1, length, hidden]; with ``places``, no others than they are given [1, n, hidden]."""
    normed = _norm(x, weight("input_layernorm"), eps)
    if places is not None:
        x = op.gather(x, places, np.int64(1))  # [1, n, hidden]
    x = op.add(x, _linear(attention(normed, weight, places), weight("self_attn.o_proj")))
    normed = _norm(x, weight("post_attention_layernorm"), eps)
    gate = op.swish(_linear(normed, weight("mlp.gate_proj")))
    return op.add(x, _linear(op.multiply(gate, _linear(normed, weight("mlp.up_proj"))), weight("mlp.down_proj")))


class _Attention:
    """Causal attention with rotary positions, several query heads to a key head."""

    def __init__(self, config: dict[str, Any], length: Any, beam: Any) -> None:
        self.beam = beam
        self.kept: list[Any] = []
        """What writes the cache."""
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
        """[1, length, hidden] -> [1, length, heads * width], or [1, n, heads * width] of the places only."""
        query = self._rotate(self._split(_linear(x, weight("self_attn.q_proj")), self.heads))
        key = self._rotate(self._split(_linear(x, weight("self_attn.k_proj")), self.key_heads))
        value = self._split(_linear(x, weight("self_attn.v_proj")), self.key_heads)
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
        """[1, key heads, length, width] behind what the cache holds, in the form that OpenVINO recognises."""
        facts = VariableInfo()
        facts.data_shape = openvino.PartialShape([-1, self.key_heads, -1, self.width])
        facts.data_type = openvino.Type.f32
        facts.variable_id = f"cache {len(self.kept)}"
        variable = Variable(facts)
        nothing = op.constant(np.zeros((1, self.key_heads, 0, self.width), np.float32))
        before = op.gather(opset6.read_value(nothing, variable), self.beam, np.int64(0))
        cache = op.concat([before, x], 2)
        self.kept.append(opset6.assign(cache, variable))
        return cache

    def _split(self, x: Any, heads: int) -> Any:
        """[1, length, heads * width] -> [1, heads, length, width]."""
        return op.transpose(op.reshape(x, np.array([1, -1, heads, self.width]), False), np.array([0, 2, 1, 3]))

    def _rotate(self, x: Any) -> Any:
        first, second = op.variadic_split(x, np.int64(3), np.array([self.width // 2] * 2)).outputs()
        turned = op.concat([op.multiply(second, np.float32(-1)), first], -1)
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
