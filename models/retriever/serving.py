"""The exported retriever: one ONNX run a request, the same offline and inside the server."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from client.contract import MAX_CANDIDATES
from models.retriever.batches import pad_left
from models.retriever.candidates import Candidates, given_candidates, top_candidates

MODEL = "retriever.onnx"
SETTINGS = "retriever.json"


class OnnxRetriever:
    """Scores the catalogue for one history at a time, so that an answer never depends on who shares its batch."""

    def __init__(self, session: Any, length: int) -> None:
        """Args:
        session: has the ``run`` of an ``onnxruntime.InferenceSession``.
        length: of the padded history.
        """
        self._session = session
        self._length = length

    @classmethod
    def load(cls, folder: Path, served: Any = None) -> "OnnxRetriever":
        """Opens ``retriever.onnx`` with the length and thread count that ``retriever.json`` fixes.

        Args:
            folder: what `llamarec export` wrote.
            served: stands for the session where the graph runs elsewhere.
        """
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        if served is not None:
            return cls(served, settings["length"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = settings["threads"]
        options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(folder / MODEL, options, providers=["CPUExecutionProvider"])
        return cls(session, settings["length"])

    def scores(self, history: NDArray[np.int32]) -> NDArray[np.float32]:
        """Logits [items + 1] of what follows a history of item numbers, oldest first; it may be empty."""
        row: NDArray[np.float32] = self._session.run(None, {"items": pad_left([history], self._length)})[0][0]
        return row

    def candidates(self, history: NDArray[np.int32], excluded: NDArray[np.int32]) -> Candidates:
        """The top 20 after masking everything in the history and everything excluded."""
        scores = self.scores(history)
        masked = np.concatenate((history, excluded))
        return top_candidates(scores, masked[masked < len(scores)], MAX_CANDIDATES)

    def given(self, history: NDArray[np.int32], items: NDArray[np.int32]) -> Candidates:
        """The caller's own candidates, in the retriever's order."""
        return given_candidates(self.scores(history), items)
