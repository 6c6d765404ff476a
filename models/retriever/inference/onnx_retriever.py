"""Runs the exported retriever: one ONNX run per request, the same offline and in the server."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from llamarec_client.contract import MAX_CANDIDATES
from models.retriever.batches import pad_left
from models.retriever.candidates import Candidates, given_candidates, top_candidates
from models.retriever.inference.index import ApproximateIndex

MODEL = "retriever.onnx"
SETTINGS = "retriever.json"
INDEX = "retriever.faiss"
STATE_MODEL = "retriever-state.onnx"
"""The graph without the scores, exported together with an index."""
MOST_PACKED = 1 << 25
"""Maximum size in bytes of weights of which ONNX Runtime keeps a packed copy: 32 MiB, or 130,000 items."""


class OnnxRetriever:
    """A retriever that scores one history at a time, so that an answer never depends on the other requests of a batch.

    Args:
        session: an ``onnxruntime.InferenceSession``, or an object with its ``run`` method.
        length: length of the padded history.
        index: approximate index; if absent, all items are scored.
        state_session: session of the graph that computes the index's query.
    """

    def __init__(
        self, session: Any, length: int, index: ApproximateIndex | None = None, state_session: Any = None
    ) -> None:
        self._session = session
        self._length = length
        self._index = index
        self._state_session = state_session

    @classmethod
    def load(cls, folder: Path, served: Any = None) -> "OnnxRetriever":
        """Return the retriever of an exported folder, with the length and thread count in its ``retriever.json``.

        Args:
            folder: a folder that `llamarec export` wrote.
            served: replaces the session if the graph runs elsewhere, for example in Triton's ONNX Runtime backend.

        Raises:
            InputError: the retriever was exported with an approximate index and faiss is not installed.
        """
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        if served is not None:
            return cls(served, settings["length"])
        session = _open(folder / MODEL, settings["threads"])
        if not settings["index"]:
            return cls(session, settings["length"])
        index = ApproximateIndex(folder / INDEX, settings["threads"])
        return cls(session, settings["length"], index, _open(folder / STATE_MODEL, settings["threads"]))

    def scores(self, history: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return the logits [items + 1] of the item after a history of item numbers, oldest first, or an empty one."""
        row: NDArray[np.float32] = self._session.run(["scores"], {"items": pad_left([history], self._length)})[0][0]
        return row

    def _state(self, history: NDArray[np.int32]) -> NDArray[np.float32]:
        inputs = {"items": pad_left([history], self._length)}
        row: NDArray[np.float32] = self._state_session.run(["state"], inputs)[0][0]
        return row

    def candidates(self, history: NDArray[np.int32], excluded: NDArray[np.int32]) -> Candidates:
        """Return the top 20 outside the history and the excluded items.

        They come from the approximate index if the retriever was exported with one, unless it finds fewer than 20.
        """
        masked = np.concatenate((history, excluded))
        if self._index is not None:
            found = self._index.search(self._state(history), masked, MAX_CANDIDATES)
            if len(found.items) == MAX_CANDIDATES:
                return found
        scores = self.scores(history)
        return top_candidates(scores, masked[masked < len(scores)], MAX_CANDIDATES)

    def given(self, history: NDArray[np.int32], items: NDArray[np.int32]) -> Candidates:
        """Return the caller's own candidates in the retriever's order."""
        return given_candidates(self.scores(history), items)


def _open(graph: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Packed weights are a second copy of the embeddings that is faster when the caches are cold, as after a pass of the
    # ranker. A large file is not packed, but stays mapped and shared between processes.
    large = graph.with_name(f"{MODEL}.data").stat().st_size > MOST_PACKED
    options.add_session_config_entry("session.disable_prepacking", str(int(large)))
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
