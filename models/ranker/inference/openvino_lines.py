"""Builds the graph of independent lines: Llama's layers over a slab of lines that continue a prefix.

A pass over the prefix is a pass over a slab with one line, the prefix, after an empty prefix.
"""

from functools import partial
from typing import Any

import numpy as np
import openvino
from openvino import opset13 as op

from models.ranker.inference.openvino_graph import (
    Weight,
    attention_shape,
    constant,
    feed_forward,
    linear,
    norm,
    rotary_tables,
    rotate,
    split_heads,
    weight_of_layer,
)

AXIS = np.int64


def line_states(config: dict[str, Any], weight: Weight) -> openvino.Model:
    """Return the graph from a slab to its lines' states, and the keys and values of its rows.

    Inputs are the six arrays of :class:`models.ranker.inference.slabs.Slab`, in its order, and for each layer the
    prefix's keys and values [key heads, prefix, width]. Outputs are the normalised hidden states at the lines' ends
    [lines, hidden], and for each layer the keys and values of all rows [key heads, rows, width].

    Args:
        config: see :func:`models.ranker.inference.openvino_graph.hidden_states`.
        weight: function that returns a tensor of the folder by name.
    """
    eps, layers = config["rms_norm_eps"], config["num_hidden_layers"]
    _, key_heads, width = attention_shape(config)
    tokens, positions = (op.parameter([-1], np.int64, name=name) for name in ("tokens", "positions"))
    members = op.parameter([-1, -1], np.int64, name="members")
    slots, ends, lasts = (op.parameter([-1], np.int64, name=name) for name in ("slots", "ends", "lasts"))
    past = [op.parameter([key_heads, -1, width], np.float32, name=f"past {number}") for number in range(2 * layers)]
    attention = _LinesAttention(config, positions, members)
    x = op.gather(constant(weight("model.embed_tokens.weight")), tokens, AXIS(0))  # [rows, hidden]
    x = op.unsqueeze(x, AXIS(0))  # [1, rows, hidden]
    kept = []
    for number in range(layers):
        of_layer, past_key, past_value = partial(weight_of_layer, weight, number), *past[2 * number : 2 * number + 2]
        query, key, value = attention.project(norm(x, of_layer("input_layernorm"), eps), of_layer)
        kept += [op.squeeze(key, AXIS(0)), op.squeeze(value, AXIS(0))]
        if number + 1 < layers:
            attended = attention.all(query, key, value, past_key, past_value, slots)
        else:
            attended = attention.at(query, key, value, past_key, past_value, ends, lasts)
            x = op.gather(x, ends, AXIS(1))  # [1, lines, hidden]
        x = op.add(x, linear(_merge_heads(attended), of_layer("self_attn.o_proj")))
        x = op.add(x, feed_forward(norm(x, of_layer("post_attention_layernorm"), eps), of_layer))
    states = op.squeeze(norm(x, weight("model.norm.weight"), eps), AXIS(0))
    inputs = [tokens, positions, members, slots, ends, lasts, *past]
    return openvino.Model([node.output(0) for node in (states, *kept)], inputs, "lines")


def _merge_heads(x: Any) -> Any:
    """Map [1, heads, n, width] to [1, n, heads * width]."""
    heads, width = (x.get_output_partial_shape(0)[axis].get_length() for axis in (1, 3))
    return op.reshape(op.transpose(x, np.array([0, 2, 1, 3])), np.array([1, -1, heads * width]), False)


class _LinesAttention:
    """Attention of each row to the prefix, and to its own line up to itself.

    The softmax runs over the prefix's keys and then those of the line, which stand at the same places whatever else the
    slab holds. Query heads that share a key head are rows of one product.
    """

    def __init__(self, config: dict[str, Any], positions: Any, members: Any) -> None:
        self.heads, self.key_heads, self.width = attention_shape(config)
        self.cos, self.sin = (
            op.unsqueeze(op.gather(op.constant(table), positions, AXIS(0)), np.array([0, 1]))
            for table in rotary_tables(config)
        )  # [1, 1, rows, width]
        self.members = op.reshape(members, np.array([-1]), False)  # [lines * line]
        self.lines, self.line = op.split(op.shape_of(members), AXIS(0), 2).outputs()
        places = op.range(AXIS(0), op.squeeze(self.line, AXIS(0)), AXIS(1), "i64")  # [line]
        seen = op.less_equal(places, op.unsqueeze(places, AXIS(1)))
        self.bias = op.select(seen, np.float32(0), np.float32(-np.inf))  # [line, line]

    def project(self, x: Any, weight: Weight) -> tuple[Any, Any, Any]:
        """Return queries [1, heads, rows, width], keys and values [1, key heads, rows, width] of x [1, rows, hidden].

        The queries are scaled.
        """
        query = rotate(split_heads(linear(x, weight("self_attn.q_proj")), self.heads, self.width), self.cos, self.sin)
        key = rotate(split_heads(linear(x, weight("self_attn.k_proj")), self.key_heads, self.width), self.cos, self.sin)
        value = split_heads(linear(x, weight("self_attn.v_proj")), self.key_heads, self.width)
        return op.multiply(query, np.float32(self.width**-0.5)), key, value

    def all(self, query: Any, key: Any, value: Any, past_key: Any, past_value: Any, slots: Any) -> Any:
        """Return the attended values of all rows [1, heads, rows, width].

        Args:
            query: see :meth:`project`, as for the next two.
            key: keys.
            value: values.
            past_key: the prefix's keys [key heads, prefix, width].
            past_value: the prefix's values [key heads, prefix, width].
            slots: place of each row in the flattened members [rows].
        """
        keys, values = self._lines_of(key), self._lines_of(value)
        own = op.matmul(self._lines_of(query), keys, False, True)  # [key heads, group, lines, line, line]
        own = op.gather(self._reshape(op.add(own, self.bias), self.heads, -1, self.line), slots, AXIS(1))
        own, theirs = self._weigh(query, own, past_key, past_value)
        own = op.gather(self._reshape(own, self.heads, -1, self.line), self.members, AXIS(1))
        own = op.matmul(self._reshape(own, self.key_heads, -1, self.lines, self.line, self.line), values, False, False)
        own = op.gather(self._reshape(own, 1, self.heads, -1, self.width), slots, AXIS(2))
        return op.add(theirs, own)

    def at(self, query: Any, key: Any, value: Any, past_key: Any, past_value: Any, ends: Any, lasts: Any) -> Any:
        """Return the attended values of each line's last token [1, heads, lines, width].

        Args:
            query: see :meth:`all`, as for the next four.
            key: keys.
            value: values.
            past_key: the prefix's keys.
            past_value: the prefix's values.
            ends: row of each of these tokens [lines].
            lasts: place of each in its line [lines].
        """
        query = op.gather(query, ends, AXIS(2))
        each = self._reshape(query, self.key_heads, -1, self.lines, 1, self.width)
        bias = op.unsqueeze(op.gather(self.bias, lasts, AXIS(0)), AXIS(1))  # [lines, 1, line]
        own = op.add(op.matmul(each, self._lines_of(key), False, True), bias)  # [key heads, group, lines, 1, line]
        own, theirs = self._weigh(query, own, past_key, past_value)
        own = self._reshape(own, self.key_heads, -1, self.lines, 1, self.line)
        own = op.matmul(own, self._lines_of(value), False, False)
        return op.add(theirs, self._reshape(own, 1, self.heads, -1, self.width))

    def _weigh(self, query: Any, own: Any, past_key: Any, past_value: Any) -> tuple[Any, Any]:
        """Return the weights of each query's own line, and what it attends to in the prefix [1, heads, n, width].

        Args:
            query: queries [1, heads, n, width].
            own: their scores of their own lines, n * line of each head.
            past_key: the prefix's keys.
            past_value: the prefix's values.
        """
        own = self._reshape(own, self.key_heads, -1, self.line)  # [key heads, group * n, line]
        theirs = op.matmul(self._reshape(query, self.key_heads, -1, self.width), past_key, False, True)
        weights = op.softmax(op.concat([theirs, own], 2), 2)
        prefix = op.gather(op.shape_of(past_key), np.array([1]), AXIS(0))
        theirs, own = op.variadic_split(weights, AXIS(2), op.concat([prefix, self.line], 0)).outputs()
        return own, self._reshape(op.matmul(theirs, past_value, False, False), 1, self.heads, -1, self.width)

    def _lines_of(self, x: Any) -> Any:
        """Map rows [1, heads, rows, width] to lines [key heads, group, lines, line, width]; keys have groups of one."""
        return self._reshape(op.gather(x, self.members, AXIS(2)), self.key_heads, -1, self.lines, self.line, self.width)

    @staticmethod
    def _reshape(x: Any, *sizes: Any) -> Any:
        """Return x in another shape, of numbers and of nodes [1]."""
        parts = [op.constant(np.array([size])) if isinstance(size, int) else size for size in sizes]
        return op.reshape(x, op.concat(parts, 0), False)
