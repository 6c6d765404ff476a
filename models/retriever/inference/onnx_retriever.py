"""Runs the exported retriever: one ONNX run per request, the same offline and in the server."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from llamarec_client.contract import MAX_CANDIDATES
from models.retriever.batches import pad_left
from models.retriever.candidates import Candidates
from models.retriever.inference.index import ApproximateIndex
from models.retriever.stage import RetrievalStage, rank_in
from models.signals.signals import Signals

MODEL = "retriever.onnx"
SECOND_MODEL = "second-retriever.onnx"
SETTINGS = "retriever.json"
INDEX = "retriever.faiss"
STATE_MODEL = "retriever-state.onnx"
"""The graph without the scores, exported together with an index."""
MOST_PACKED = 1 << 25
"""Maximum size in bytes of weights of which ONNX Runtime keeps a packed copy: 32 MiB, or 130,000 items."""


@dataclass(frozen=True)
class Graph:
    """A retriever's graph, which scores one history at a time."""

    session: Any
    """An ``onnxruntime.InferenceSession``, or an object with its ``run`` method."""
    length: int
    """Length of the padded history."""

    def run(self, output: str, history: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return one output of the graph, ``scores`` [items + 1] or ``state`` [width], for a history."""
        row: NDArray[np.float32] = self.session.run([output], {"items": pad_left([history], self.length)})[0][0]
        return row


@dataclass(frozen=True)
class OnnxRetriever:
    """A retrieval stage that answers one history at a time, so that no answer depends on others of its batch."""

    graphs: Sequence[Graph]
    """One or two retrievers, which score all items."""
    stage: RetrievalStage
    index: ApproximateIndex | None = None
    """Approximate index of one retriever's items; if absent, all items are scored."""
    state: Graph | None = None
    """Graph that computes the index's query."""
    count: int = MAX_CANDIDATES
    """Number of candidates that are handed on."""

    @classmethod
    def load(cls, folder: Path, served: Any = None) -> "OnnxRetriever":
        """Return the retriever of an exported folder, with the lengths and thread count in its ``retriever.json``.

        Args:
            folder: a folder that `llamarec export` wrote.
            served: replaces the first retriever's session if its graph runs elsewhere, for example in Triton's ONNX
                Runtime backend.

        Raises:
            InputError: the retriever was exported with an approximate index and faiss is not installed.
        """
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        threads, stage = settings["threads"], RetrievalStage(Signals.load(folder))
        graphs = [Graph(served or _open(folder / MODEL, threads), settings["length"])]
        if "second_length" in settings:
            graphs.append(Graph(_open(folder / SECOND_MODEL, threads), settings["second_length"]))
        count = settings.get("candidates", MAX_CANDIDATES)  # absent in earlier exports
        if served is not None or not settings["index"]:
            return cls(graphs, stage, count=count)
        index = ApproximateIndex(folder / INDEX, threads)
        return cls(graphs, stage, index, Graph(_open(folder / STATE_MODEL, threads), settings["length"]), count)

    def scores(self, history: NDArray[np.int32]) -> list[NDArray[np.float32]]:
        """Return each retriever's logits [items + 1] of the item after a history of item numbers, oldest first."""
        return [graph.run("scores", history) for graph in self.graphs]

    def candidates(self, history: NDArray[np.int32], excluded: NDArray[np.int32], k: int | None = None) -> Candidates:
        """Return the top ``k`` outside the history and the excluded items; by default ``count`` of them.

        They come from the approximate index if the retriever was exported with one, unless it finds too few.
        """
        k = k or self.count
        masked = np.concatenate((history, excluded))
        if self.index is not None and (found := self._search(history, masked, k)) is not None:
            return found
        rows = self.scores(history)
        return self.stage.candidates(rows, history, masked[masked < len(rows[0])], k)

    def given(self, history: NDArray[np.int32], items: NDArray[np.int32]) -> Candidates:
        """Return the caller's own candidates in the stage's order."""
        return self.stage.given(self.scores(history), history, items)

    def rank(self, history: NDArray[np.int32], item: int) -> int:
        """Return the rank (from 1) of an item among all items outside the history; 0 if it is in the history."""
        rows = self.scores(history)
        ordered = self.stage.ordered(rows, history, history, MAX_CANDIDATES)
        return rank_in(ordered, rows[0], item)

    def _search(self, history: NDArray[np.int32], masked: NDArray[np.int32], k: int) -> Candidates | None:
        """Return the top ``k`` of the index; None if it finds too few."""
        assert self.index is not None
        assert self.state is not None
        signals = self.stage.signals
        wanted = k if signals is None else max(signals.pool, k)
        found = self.index.search(self.state.run("state", history), masked, wanted)
        if len(found.items) < wanted:
            return None
        if signals is not None:
            order = np.argsort(found.items)
            found = self.stage.reorder(history, found.items[order], found.scores[order, np.newaxis])
        return found.first(k)


def _open(graph: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Packed weights are a second copy of the embeddings that is faster when the caches are cold, as after a pass of the
    # ranker. A large file is not packed, but stays mapped and shared between processes.
    data = MODEL if graph.name == STATE_MODEL else graph.name
    large = graph.with_name(f"{data}.data").stat().st_size > MOST_PACKED
    options.add_session_config_entry("session.disable_prepacking", str(int(large)))
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
