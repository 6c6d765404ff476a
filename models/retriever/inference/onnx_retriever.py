"""Runs the exported retriever: one ONNX run per request, the same offline and in the server."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from llamarec_client.contract import MAX_CANDIDATES
from models.retriever.batches import pad_left
from models.retriever.candidates import Candidates, best_first, given_candidates
from models.retriever.inference.added import AddedVectors, TextArm
from models.retriever.inference.index import ApproximateIndex
from models.retriever.rules import Rules, select, with_boosts
from models.retriever.stage import RetrievalStage, rank_in
from models.signals.signals import Signals
from preprocessing.groups import Groups

MODEL = "retriever.onnx"
SECOND_MODEL = "second-retriever.onnx"
SETTINGS = "retriever.json"
INDEX = "retriever.faiss"
STATE_MODEL = "retriever-state.onnx"
"""The graph without the scores, exported together with an index."""
TEXT_ARM, SECOND_TEXT_ARM = "titles", "second-titles"
"""Folders of what each retriever learned of titles (:class:`models.retriever.inference.added.TextArm`)."""
MOST_PACKED = 1 << 25
"""Maximum size in bytes of weights of which ONNX Runtime keeps a packed copy: 32 MiB, or 130,000 items."""


@dataclass(frozen=True)
class Graph:
    """A retriever's graph, which scores one history at a time."""

    session: Any
    """An ``onnxruntime.InferenceSession``, or an object with its ``run`` method."""
    length: int
    """Length of the padded history."""
    added: AddedVectors | None = None
    """Items that are scored besides those of the graph."""

    def scores(self, history: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return the logits [items + 1] of the item after a history, those of added items last."""
        if self.added is None:
            return self.run(["scores"], history)[0]
        scores, state = self.run(["scores", "state"], history)
        return np.concatenate((scores, self.added.scores(state)))

    def state(self, history: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return the state [width] from which the scores of a history are computed."""
        return self.run(["state"], history)[0]

    def run(self, outputs: list[str], history: NDArray[np.int32]) -> list[NDArray[np.float32]]:
        """Return outputs of the graph for a history, in which the most similar items stand for the added ones."""
        read = history if self.added is None else self.added.read_as(history)
        return [rows[0] for rows in self.session.run(outputs, {"items": pad_left([read], self.length)})]


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
    arms: Sequence[TextArm] = ()
    """What each retriever learned of titles; empty if one of them did not, or cannot encode a new title here."""

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
        arms = [arm for name in (TEXT_ARM, SECOND_TEXT_ARM) if (arm := TextArm.load(folder / name)) is not None]
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        threads, stage = settings["threads"], RetrievalStage(Signals.load(folder))
        graphs = [Graph(served or _open(folder / MODEL, threads), settings["length"])]
        if "second_length" in settings:
            graphs.append(Graph(_open(folder / SECOND_MODEL, threads), settings["second_length"]))
        count = settings.get("candidates", MAX_CANDIDATES)  # absent in earlier exports
        if served is not None or not settings["index"]:
            return cls(graphs, stage, count=count, arms=arms)
        index = ApproximateIndex(folder / INDEX, threads)
        state = Graph(_open(folder / STATE_MODEL, threads), settings["length"])
        return cls(graphs, stage, index, state, count, arms)

    def with_added(self, titles: Sequence[str | None]) -> "OnnxRetriever":
        """Return a retriever of these items too, which are numbered after those of the graph.

        Without a text arm it cannot retrieve them, and is returned as it is.

        Args:
            titles: of all added items by number; None for a number by which no item is retrieved.
        """
        if not self.arms or not titles:
            return self
        added = [arm.added(titles) for arm in self.arms]
        graphs = [replace(graph, added=some) for graph, some in zip(self.graphs, added, strict=True)]
        stage = self.stage
        if stage.signals is not None:
            stage = RetrievalStage(stage.signals.with_added(added[0].words, self.arms[0].trained))
        state = None if self.state is None else replace(self.state, added=added[0])
        return replace(self, graphs=graphs, stage=stage, state=state)

    def scores(self, history: NDArray[np.int32]) -> list[NDArray[np.float32]]:
        """Return each retriever's logits [items + 1] of the item after a history of item numbers, oldest first."""
        return [graph.scores(history) for graph in self.graphs]

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
        """Return the caller's own candidates in the stage's order; see :meth:`RetrievalStage.given`."""
        if not (items > 0).any():  # nothing to score: texts alone, or no candidates at all
            return given_candidates(np.empty(0, np.float32), items)
        return self.stage.given(self.scores(history), history, items)

    def candidates_by(
        self, rules: Rules, groups: Groups, history: NDArray[np.int32], excluded: NDArray[np.int32]
    ) -> Candidates:
        """Return the top ``count`` that the rules of a policy allow.

        The approximate index cannot follow rules about groups and boosts, so all items are scored for them.
        """
        masked = np.concatenate((rules.masked_of(history), excluded))
        if self.index is not None and rules.only_mask:
            found = self._search(history, masked, self.count)
            if found is not None:
                return found
        return select(self.stage, self.scores(history), history, masked, self.count, rules, groups)

    def given_by(self, rules: Rules, history: NDArray[np.int32], items: NDArray[np.int32]) -> Candidates:
        """Return the caller's own candidates in the stage's order after the boosts of a policy."""
        return with_boosts(self.given(history, items), rules)

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
        query = self.state.state(history)
        found = self.index.search(query, masked, wanted)
        if len(found.items) < wanted:
            return None
        if self.state.added is not None:
            found = _merged(found, self.state.added, query, masked)
        if signals is not None:
            order = np.argsort(found.items)
            found = self.stage.reorder(history, found.items[order], found.scores[order, np.newaxis])
        return found.first(k)


def _merged(
    found: Candidates, added: AddedVectors, query: NDArray[np.float32], masked: NDArray[np.int32]
) -> Candidates:
    """Return the best of the items that an index found and of the added items, as many as were found."""
    scores = added.scores(query)
    scores[masked[masked >= added.first] - added.first] = -np.inf
    kept = np.flatnonzero(np.isfinite(scores))
    items = np.concatenate((found.items, kept.astype(np.int32) + added.first))
    both = np.concatenate((found.scores, scores[kept]))
    order = best_first(both)[: len(found.items)]
    return Candidates(items[order].astype(np.int32), both[order], found.ranks)


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
