"""Runs the merged ranker in OpenVINO: builds Llama's layers as one graph from the safetensors, without torch.

Beyond the last layer's keys and values, only the positions that are read are computed: nothing else affects the scores.
OpenVINO has fast kernels for subgraphs of a certain form: rotary embeddings, attention with a cache of keys and values,
and for some widths the whole feed-forward block, whose tensors must have three dimensions.
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

from models.ranker.inference.openvino_support import UNSUPPORTED, openvino_runs
from models.ranker.inference.scorer import Runtime, Scorer
from preprocessing.errors import InputError

Weight = Callable[[str], NDArray[Any]]
PRECISION = {"float32": "f32", "bfloat16": "bf16"}


class OpenVinoScorer(Scorer):
    """A scorer that runs in OpenVINO on the processor."""

    def __init__(self, folder: Path, runtime: Runtime) -> None:
        """Compile the merged model's graph; see :func:`models.ranker.inference.runtimes.load_scorer`.

        Raises:
            InputError: the model has a feature that the graph does not implement.
        """
        if not openvino_runs(folder):
            raise InputError(UNSUPPORTED)
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
                # The default rounds the cache to 8 bits.
                **({"KV_CACHE_PRECISION": PRECISION[runtime.dtype]} if cached else {}),
                # OpenVINO caches kernels for each prompt length, at megabytes each. With the default capacity none
                # would ever be dropped, and a server's memory would grow for days. Compiling a dropped kernel again
                # takes a fraction of one pass.
                "CPU_RUNTIME_CACHE_CAPACITY": 256,
                # With pinning, the threads of all instances of the ranker would share the first cores.
                "ENABLE_CPU_PINNING": False,
            },
        )
        self._request = compiled.create_infer_request()
        self._beam = [np.zeros(1, np.int32)] if cached else []

    def rows(self, label_ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the head's rows for these tokens [labels, hidden]; see :class:`Scorer`."""
        rows: NDArray[np.float32] = self._head[list(label_ids)].astype(np.float32)
        return rows

    def states(self, token_ids: Sequence[int], places: Sequence[int]) -> NDArray[np.float32]:
        """Return the normalised hidden states at these positions [places, hidden]; see :class:`Scorer`."""
        self._request.reset_state()
        found = self._request.infer([np.asarray(token_ids, np.int64), np.asarray(places, np.int64), *self._beam])
        states: NDArray[np.float32] = found[0]
        return states


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
    x = op.gather(_constant(weight("model.embed_tokens.weight")), tokens, np.int64(0))  # [length, hidden]
    x = op.unsqueeze(x, np.int64(0))  # [1, length, hidden]
    beam = op.parameter([-1], np.int32, name="beam") if cached else None  # [1]: 0, the index of the only sequence
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
    """Return a decoder layer's output for x [1, length, hidden]; with ``places``, at those alone [1, n, hidden]."""
    normed = _norm(x, weight("input_layernorm"), eps)
    if places is not None:
        x = op.gather(x, places, np.int64(1))  # [1, n, hidden]
    x = op.add(x, _linear(attention(normed, weight, places), weight("self_attn.o_proj")))
    normed = _norm(x, weight("post_attention_layernorm"), eps)
    gate = op.swish(_linear(normed, weight("mlp.gate_proj")))
    return op.add(x, _linear(op.multiply(gate, _linear(normed, weight("mlp.up_proj"))), weight("mlp.down_proj")))


class _Attention:
    """Causal attention with rotary positions, in which several query heads may share a key head."""

    def __init__(self, config: dict[str, Any], length: Any, beam: Any) -> None:
        self.beam = beam
        self.kept: list[Any] = []
        """Nodes that write the cache."""
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
        """Map x [1, length, hidden] to [1, length, heads * width], or to [1, n, heads * width] at ``places`` alone."""
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

    def _split(self, x: Any, heads: int) -> Any:
        """Map [1, length, heads * width] to [1, heads, length, width]."""
        return op.transpose(op.reshape(x, np.array([1, -1, heads, self.width]), False), np.array([0, 2, 1, 3]))

    def _rotate(self, x: Any) -> Any:
        first, second = op.variadic_split(x, np.int64(3), np.array([self.width // 2] * 2)).outputs()
        turned = op.concat([op.multiply(second, np.float32(-1)), first], -1)
        return op.add(op.multiply(x, self.cos), op.multiply(turned, self.sin))

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


def _constant(array: NDArray[Any]) -> Any:
    return op.convert(op.constant(array), "f32")


def _linear(x: Any, weight: NDArray[Any]) -> Any:
    return op.matmul(x, _constant(weight), False, True)


def _norm(x: Any, weight: NDArray[Any], eps: float) -> Any:
    """Return x after root mean square normalisation (Zhang and Sennrich 2019)."""
    mean_square = op.reduce_mean(op.power(x, np.float32(2)), np.array([-1]), True)
    scale = op.divide(np.float32(1), op.sqrt(op.add(mean_square, np.float32(eps))))
    return op.multiply(op.multiply(x, scale), _constant(weight))
