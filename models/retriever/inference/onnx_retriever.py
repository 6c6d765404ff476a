"""The exported retriever: one ONNX run a request, the same offline and inside the server."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from llamarec_client.contract import MAX_CANDIDATES
from models.retriever.batches import pad_left
from models.retriever.candidates import Candidates, given_candidates, top_candidates

if TYPE_CHECKING:
    from models.retriever.inference.index import ApproximateIndex

MODEL = "retriever.onnx"
SETTINGS = "retriever.json"
INDEX = "retriever.faiss"
STATE_MODEL = "retriever-state.onnx"
"""Beside an index: the graph without the scores."""
MOST_PACKED = 1 << 25
"""Bytes of weights up to which ONNX Runtime may keep a packed copy of them: 32 MiB, 130,000 items."""


class OnnxRetriever:
    """Scores the catalogue for one history at a time, so that an answer never depends on who shares its batch."""

    def __init__(
        self, session: Any, length: int, index: "ApproximateIndex | None" = None, state_session: Any = None
    ) -> None:
        """Args:
        session: has the ``run`` of an ``onnxruntime.InferenceSession``.
        length: of the padded history.
        index: searches approximately; by default all items are scored.
        state_session: computes what the index searches for.
        """
        self._session = session
        self._length = length
        self._index = index
        self._state_session = state_session

    @classmethod
    def load(cls, folder: Path, served: Any = None) -> "OnnxRetriever":
        """Opens ``retriever.onnx`` with the length and thread count that ``retriever.json`` fixes.

        Args:
            folder: what `llamarec export` wrote.
            served: stands for the session where the graph runs elsewhere.

        Raises:
            InputError: it was exported with an approximate index and faiss is not installed.
        """
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        if served is not None:
            return cls(served, settings["length"])
        session = _open(folder / MODEL, settings["threads"])
        if not settings["index"]:
            return cls(session, settings["length"])
        from models.retriever.inference.index import ApproximateIndex

        index = ApproximateIndex(folder / INDEX, settings["threads"])
        return cls(session, settings["length"], index, _open(folder / STATE_MODEL, settings["threads"]))

    def scores(self, history: NDArray[np.int32]) -> NDArray[np.float32]:
        """Logits [items + 1] of what follows a history of item numbers, oldest first; it may be empty."""
        row: NDArray[np.float32] = self._session.run(["scores"], {"items": pad_left([history], self._length)})[0][0]
        return row

    def _state(self, history: NDArray[np.int32]) -> NDArray[np.float32]:
        inputs = {"items": pad_left([history], self._length)}
        row: NDArray[np.float32] = self._state_session.run(["state"], inputs)[0][0]
        return row

    def candidates(self, history: NDArray[np.int32], excluded: NDArray[np.int32]) -> Candidates:
        """The top 20 after masking everything in the history and everything excluded.

        By the approximate index where the retriever was exported with one, unless that finds fewer than 20.
        """
        masked = np.concatenate((history, excluded))
        if self._index is not None:
            found = self._index.search(self._state(history), masked, MAX_CANDIDATES)
            if len(found.items) == MAX_CANDIDATES:
                return found
        scores = self.scores(history)
        return top_candidates(scores, masked[masked < len(scores)], MAX_CANDIDATES)

    def given(self, history: NDArray[np.int32], items: NDArray[np.int32]) -> Candidates:
        """The caller's own candidates, in the retriever's order."""
        return given_candidates(self.scores(history), items)


def _open(graph: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Packed weights are a second copy of the embeddings, and faster behind a pass of the ranker, when the caches are
    # cold. A large file stays mapped and shared instead.
    large = graph.with_name(f"{MODEL}.data").stat().st_size > MOST_PACKED
    options.add_session_config_entry("session.disable_prepacking", str(int(large)))
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
