"""The `retriever` step: a history to its candidates."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llamarec_client.contract import (
    CANDIDATE_TITLE,
    ENSEMBLE,
    ITEM_ID,
    RETRIEVAL_ENSEMBLE,
    RETRIEVER_RANK,
    SCORE,
    TensorSpec,
)
from models.retriever.inference.onnx_retriever import OnnxRetriever
from preprocessing.catalogue import ITEMS_FILE, Catalogue
from preprocessing.errors import InputError
from serving.contract import (
    CANDIDATE_BOOST,
    CANDIDATE_ID,
    CANDIDATE_ITEM,
    CANDIDATE_RANK,
    CANDIDATE_SCORE,
    CANDIDATE_TEXT,
    EXCLUDED_ITEM,
    GIVEN_ID,
    GIVEN_ITEM,
    GIVEN_TEXT,
    HISTORY_ITEM,
    LIMIT,
    RETRIEVE,
    RULES,
)
from serving.live_items import LiveItems, open_items
from serving.policy import decode_rules, given_candidates, retrieved
from serving.steps.answers import answered_ensemble
from serving.steps.step import Answer, Tensors, cut, degraded_reason
from stores.store import Store


@dataclass(frozen=True)
class TritonScores:
    """The retriever's graph as another model of this server; has the ``run`` of an ONNX session."""

    model: str

    def run(self, outputs: list[str], feeds: Mapping[str, NDArray[np.int64]]) -> list[NDArray[np.float32]]:
        """Return outputs, such as ``scores`` [1, items + 1], for ``items`` [1, length].

        Raises:
            RuntimeError: the model did not answer.
        """
        import triton_python_backend_utils as pb_utils  # exists only inside the server

        tensors = [pb_utils.Tensor(name, array) for name, array in feeds.items()]
        memory = pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0)
        request = pb_utils.InferenceRequest(
            model_name=self.model, requested_output_names=outputs, inputs=tensors, preferred_memory=memory
        )
        response = request.exec()
        if response.has_error():
            raise RuntimeError(f"{self.model}: {response.error().message()}")
        return [pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in outputs]


class Retrieval(NamedTuple):
    """A retriever, and the catalogue that names its items."""

    retriever: OnnxRetriever
    catalogue: Catalogue

    def with_added(self, added: Sequence[tuple[bytes, str]]) -> "Retrieval":
        """Return a retriever of further items too, by raw id and title."""
        catalogue = self.catalogue.with_added(added)
        return Retrieval(self.retriever.with_added(catalogue.titles_after(len(self.catalogue))), catalogue)


@dataclass(frozen=True)
class RetrieverStep:
    """Retrieves the top candidates of a history, or orders the caller's own."""

    items: LiveItems[Retrieval]
    exported: int
    """Number of items in the exported catalogue; added items follow."""

    @classmethod
    def load(cls, folder: Path, scores_model: str | None = None, store: str | None = None) -> "RetrieverStep":
        """Open the retriever's graphs and signals, and ``items.parquet``.

        Args:
            folder: what `llamarec export` wrote.
            scores_model: the model of this server that runs the graph; without it, this process does.
            store: address of the store of items that are added while the server runs.
        """
        session = TritonScores(scores_model) if scores_model else None
        return cls.of(
            OnnxRetriever.load(folder, session), Catalogue.load(folder / ITEMS_FILE), open_items(folder, store)
        )

    @classmethod
    def of(cls, retriever: OnnxRetriever, catalogue: Catalogue, store: Store | None = None) -> "RetrieverStep":
        """Return the step of a retriever, the catalogue that names its items, and a store of further items."""
        exported = Retrieval(retriever, catalogue)
        return cls(LiveItems(exported, lambda now: exported.with_added(now.added), store), len(catalogue))

    def answer(self, request: Tensors) -> Answer:
        """Return the candidates for the next step, and the whole answer of ``llamarec_retrieval``.

        If the caller gave titles and a candidate has no score, the next steps get none: the language model orders all.
        """
        history = request[HISTORY_ITEM]
        largest = max(int(request[spec].max(initial=0)) for spec in (HISTORY_ITEM, EXCLUDED_ITEM, GIVEN_ITEM))
        retriever, catalogue = self.items.current(largest - self.exported)
        rules = decode_rules(request.get(RULES, ()))
        if request[RETRIEVE][0]:
            candidates = retrieved(retriever, catalogue, rules, history, request[EXCLUDED_ITEM])
        else:
            candidates = given_candidates(retriever, rules, history, request[GIVEN_ITEM])
        texts = _by_item(request, GIVEN_TEXT)
        ids = _raw_ids(catalogue, candidates.items, _by_item(request, GIVEN_ID))
        answered, scores, ranks = cut(request[LIMIT], ids, candidates.probabilities(), candidates.ranks)
        return {
            CANDIDATE_ITEM: candidates.items,
            CANDIDATE_ID: ids,
            CANDIDATE_SCORE: (candidates.comparable() if texts else candidates).scores,
            CANDIDATE_RANK: candidates.ranks,
            CANDIDATE_TEXT: [texts[item] for item in candidates.items.tolist()] if texts else [],
            CANDIDATE_BOOST: [] if candidates.boosts is None else candidates.boosts,
            ITEM_ID: answered,
            SCORE: scores,
            RETRIEVER_RANK: ranks,
        }

    def check(self, answer: Answer, wanted: Collection[str]) -> None:
        """Refuse candidates of which the retriever knows none in ``llamarec_retrieval``, see :class:`CheckedStep`.

        Raises:
            InputError: the order of such an answer would be no more than the caller's.
        """
        items, ranks = np.asarray(answer[CANDIDATE_ITEM]), np.asarray(answer[CANDIDATE_RANK])
        if (items < 0).any() and not ranks.any() and answered_ensemble("retriever", wanted) == RETRIEVAL_ENSEMBLE:
            raise InputError(
                f"{CANDIDATE_TITLE.name} describes candidates of which the retriever knows none: ask {ENSEMBLE}, whose"
                " language model reads them"
            )

    def facts(self, request: Tensors, answer: Answer, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the number of candidates, and why the client degraded to the retriever, if it did."""
        return {"candidates": len(np.asarray(answer[CANDIDATE_ITEM])), "degraded": degraded_reason(parameters)}


def _by_item(request: Tensors, spec: TensorSpec) -> dict[int, bytes]:
    """Return a tensor that goes with GIVEN_ITEM by item number; nothing if the caller gave no titles of candidates."""
    if spec not in request or not len(request[spec]):
        return {}
    return dict(zip(request[GIVEN_ITEM].tolist(), request[spec].tolist(), strict=True))


def _raw_ids(catalogue: Catalogue, items: NDArray[np.int32], given: Mapping[int, bytes]) -> NDArray[np.object_]:
    """Return the raw ids [k] of item numbers [k], as bytes; of a negative number, the given one."""
    ids = np.empty(len(items), dtype=object)
    ids[:] = [catalogue.raw(item) if item > 0 else given[item] for item in items.tolist()]
    return ids
