"""Runs the merged ranker in OpenVINO."""

import json
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray

from models.ranker.inference.openvino_graph import attention_shape, hidden_states, weights_of
from models.ranker.inference.openvino_lines import line_states
from models.ranker.inference.openvino_support import UNSUPPORTED, openvino_runs
from models.ranker.inference.prefixes import Prefix
from models.ranker.inference.scorer import Runtime, SlabScorer
from models.ranker.inference.slab_check import settle_slabs
from models.ranker.inference.slabs import Slab, prefix_slab
from models.ranker.prompt import Prompt
from preprocessing.errors import InputError

PRECISION = {"float32": "f32", "bfloat16": "bf16"}


@cache
def openvino_core() -> openvino.Core:
    """Return the only core of this process, which is never destroyed.

    A core gives its thread another stack for signals, and restores the one before when it is destroyed. If two are
    destroyed in the order in which they were made, that one is gone, and the next signal ends the process.
    """
    return openvino.Core()


class OpenVinoScorer(SlabScorer):
    """A scorer that runs in OpenVINO on the processor."""

    def __init__(self, folder: Path, runtime: Runtime) -> None:
        """Open the merged model; see :func:`models.ranker.inference.runtimes.load_scorer`.

        Its graphs, one for whole prompts and one for independent lines, are compiled when they are first used, since a
        ranker uses one of them.

        Raises:
            InputError: the model has a feature that the graphs do not implement.
        """
        super().__init__()
        if not openvino_runs(folder):
            raise InputError(UNSUPPORTED)
        self._config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self._weight = weights_of(folder)
        self._runtime = runtime
        head = "model.embed_tokens.weight" if self._config["tie_word_embeddings"] else "lm_head.weight"
        self._head = self._weight(head)  # [vocabulary, hidden], as stored

    def rows(self, label_ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the head's rows for these tokens [labels, hidden]; see :class:`Scorer`."""
        rows: NDArray[np.float32] = self._head[list(label_ids)].astype(np.float32)
        return rows

    def states(self, token_ids: Sequence[int], places: Sequence[int]) -> NDArray[np.float32]:
        """Return the normalised hidden states at these positions [places, hidden]; see :class:`Scorer`."""
        request, beam = self._whole
        request.reset_state()
        found = request.infer([np.asarray(token_ids, np.int64), np.asarray(places, np.int64), *beam])
        states: NDArray[np.float32] = found[0]
        return states

    def settle(self, prompts: Sequence[Prompt]) -> None:
        """Choose the slabs of independent lines; see :class:`Scorer`."""
        if prompts[0].prefix:
            settle_slabs(self, prompts[0])

    def prefix(self, token_ids: Sequence[int]) -> Prefix:
        """Return the keys and values of each layer; see :class:`SlabScorer`."""
        _, heads, width = attention_shape(self._config)
        layers = self._config["num_hidden_layers"]
        nothing = Prefix([(np.empty((heads, 0, width), np.float32),) * 2] * layers)
        found = self._infer(nothing, prefix_slab(token_ids))
        return Prefix([(found[number], found[number + 1]) for number in range(1, 2 * layers, 2)])

    def slab_states(self, prefix: Prefix, slab: Slab) -> NDArray[np.float32]:
        """Return the normalised hidden states at the lines' ends [lines, hidden]; see :class:`SlabScorer`."""
        states: NDArray[np.float32] = self._infer(prefix, slab)[0]
        return states

    def _infer(self, prefix: Prefix, slab: Slab) -> Any:
        arrays = [slab.tokens, slab.positions, slab.members, slab.slots, slab.ends, slab.lasts]
        return self._lines.infer([*arrays, *(array for pair in prefix.layers for array in pair)])

    @cached_property
    def _whole(self) -> tuple[Any, list[NDArray[np.int32]]]:
        """Request of the graph over whole prompts, and its input beyond tokens and positions."""
        cached = self._runtime.dtype == "bfloat16"
        # The default rounds the cache to 8 bits.
        precision = {"KV_CACHE_PRECISION": PRECISION[self._runtime.dtype]} if cached else {}
        request = self._compile(hidden_states(self._config, self._weight, cached), precision)
        return request, [np.zeros(1, np.int32)] if cached else []

    @cached_property
    def _lines(self) -> Any:
        """Request of the graph over slabs of lines."""
        return self._compile(line_states(self._config, self._weight), {})

    def _compile(self, graph: openvino.Model, settings: dict[str, str]) -> Any:
        compiled = openvino_core().compile_model(
            graph,
            "CPU",
            {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": self._runtime.threads,
                "INFERENCE_PRECISION_HINT": PRECISION[self._runtime.dtype],
                **settings,
                # OpenVINO caches kernels for each prompt length, at megabytes each. With the default capacity none
                # would ever be dropped, and a server's memory would grow for days. Compiling a dropped kernel again
                # takes a fraction of one pass.
                "CPU_RUNTIME_CACHE_CAPACITY": 256,
                # With pinning, the threads of all instances of the ranker would share the first cores.
                "ENABLE_CPU_PINNING": False,
            },
        )
        return compiled.create_infer_request()
