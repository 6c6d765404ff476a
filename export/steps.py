"""What the Triton steps do: decode a request, call what offline evaluation calls too, encode the answer.

Every ``model_repository/<step>/1/model.py`` is a thin adapter over one class here. Requests that Triton hands over
together are answered one by one, so that an answer never depends on who shares its batch and one bad request spoils no
other.
"""

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from client.contract import (
    CANDIDATE_ID,
    CANDIDATE_ITEM,
    CANDIDATE_RANK,
    CANDIDATE_SCORE,
    CANDIDATES,
    EXCLUDE,
    EXCLUDED_ITEM,
    GIVEN_ITEM,
    HISTORY,
    HISTORY_ITEM,
    ITEM_ID,
    LIMIT,
    RETRIEVE,
    RETRIEVER_RANK,
    SCORE,
    STEP_SPECS,
    STEPS,
    TOKEN,
    TOP_K,
    TensorSpec,
)
from preprocessing.artifacts import read_manifest
from preprocessing.errors import InputError

if TYPE_CHECKING:  # each step's process imports only what that step needs: torch alone costs 144 MB
    from models.ranker.prompt import PromptBuilder
    from models.ranker.serving import Ranker
    from models.retriever.serving import OnnxRetriever
    from preprocessing.catalogue import Catalogue
    from preprocessing.features import FeatureEncoder

ARTIFACT = "artifact"
ARTIFACT_KIND = "step"
REMEDY = "llamarec export"
DTYPES: Mapping[str, type] = {"STRING": object, "INT32": np.int32, "FP32": np.float32}

Tensors = Mapping[TensorSpec, NDArray[Any]]
"""Arrays [n] of one request, without the batch dimension; an optional tensor that was not sent is not in it."""
Answer = Mapping[TensorSpec, ArrayLike]


def artifact_folder(step: str, arguments: Mapping[str, str]) -> Path:
    """The exported files of a step, as given by the arguments of Triton's ``initialize``.

    Raises:
        InputError: nothing is exported, or another step's files are from another export.
    """
    version = arguments["model_version"]
    repository = Path(arguments["model_repository"]).parent
    folder = Path(arguments["model_repository"]) / version / ARTIFACT
    release = _release(folder)
    for other in STEPS:
        sibling = repository / other / version / ARTIFACT
        if other != step and sibling.exists() and _release(sibling) != release:
            raise InputError(f"{step} and {other} are from different exports: half exported, run `{REMEDY}`")
    return folder


def _release(folder: Path) -> str:
    return str(read_manifest(folder, ARTIFACT_KIND, REMEDY).facts["release"])


def answer_each(step: str, answer: Callable[[Tensors], Answer], requests: Sequence[Any]) -> list[Any]:
    """Triton's ``execute``: one response for each request, in order.

    Bad input becomes INVALID_ARGUMENT and any other failure INTERNAL, both naming the step.
    """
    return [_answer_one(step, answer, request) for request in requests]


def _answer_one(step: str, answer: Callable[[Tensors], Answer], request: Any) -> Any:
    import triton_python_backend_utils as pb_utils  # exists only inside the server

    try:
        answered = answer(_read(request, STEP_SPECS[step].inputs))
        tensors = [
            pb_utils.Tensor(spec.name, np.asarray(answered[spec], DTYPES[spec.data_type])[np.newaxis])
            for spec in STEP_SPECS[step].outputs
        ]
        return pb_utils.InferenceResponse(output_tensors=tensors)
    except InputError as error:
        failure = pb_utils.TritonError(f"{step}: {error}", pb_utils.TritonError.INVALID_ARG)
    except Exception as error:
        pb_utils.Logger.log_error(traceback.format_exc())
        failure = pb_utils.TritonError(f"{step}: {type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)
    return pb_utils.InferenceResponse(output_tensors=[], error=failure)


def _read(request: Any, specs: Sequence[TensorSpec]) -> Tensors:
    """The tensors of a request.

    Raises:
        InputError: more than one user.
    """
    import triton_python_backend_utils as pb_utils

    tensors = {}
    for spec in specs:
        tensor = pb_utils.get_input_tensor_by_name(request, spec.name)
        if tensor is not None:
            array = tensor.as_numpy()  # [1, n]
            if len(array) != 1:
                raise InputError(f"{spec.name} holds {len(array)} users: send one request for each")
            tensors[spec] = array[0]
    return tensors


def _cut(limit: NDArray[np.int32], *arrays: NDArray[Any]) -> list[NDArray[Any]]:
    """The first LIMIT entries of each array; all of them when it is 0."""
    return [array[: int(limit[0]) or None] for array in arrays]


def _raw_ids(catalogue: "Catalogue", items: NDArray[np.int32]) -> NDArray[np.object_]:
    """The raw ids [k] of item numbers [k], as bytes."""
    ids = np.empty(len(items), dtype=object)
    ids[:] = [catalogue.raw(int(item)) for item in items]
    return ids


@dataclass(frozen=True)
class Features:
    """Raw ids to the catalogue's numbers, with every check of the request's limits."""

    encoder: "FeatureEncoder"
    count_unknown: Callable[[int], None]
    """Told how many items of each history were not in the catalogue."""

    @classmethod
    def load(cls, folder: Path, count_unknown: Callable[[int], None]) -> "Features":
        """Opens ``items.parquet``."""
        from preprocessing.catalogue import Catalogue
        from preprocessing.features import FeatureEncoder

        return cls(FeatureEncoder(Catalogue.load(folder / "items.parquet")), count_unknown)

    def answer(self, request: Tensors) -> Answer:
        """The numbers of a request.

        Raises:
            InputError: the request is beyond a limit or names an unknown candidate.
        """
        encoded = self.encoder.encode(
            request[HISTORY].tolist(),
            request[EXCLUDE].tolist() if EXCLUDE in request else [],
            request[CANDIDATES].tolist() if CANDIDATES in request else None,
            int(request[TOP_K][0]) if TOP_K in request else None,
        )
        self.count_unknown(encoded.unknown)
        return {
            HISTORY_ITEM: encoded.history,
            EXCLUDED_ITEM: encoded.excluded,
            GIVEN_ITEM: encoded.given,
            RETRIEVE: [encoded.retrieve],
            LIMIT: [encoded.limit],
        }


def unknown_items_counter() -> Callable[[int], None]:
    """Adds to the counter ``llamarec_unknown_items_total`` on the server's metrics endpoint."""
    import triton_python_backend_utils as pb_utils

    family = pb_utils.MetricFamily(
        name="llamarec_unknown_items_total",
        description="Items of requests' histories that the catalogue does not know",
        kind=pb_utils.MetricFamily.COUNTER,
    )
    metric = family.Metric(labels={})

    def count(items: int, family: Any = family) -> None:  # the metric dies with its family
        metric.increment(items)

    return count


@dataclass(frozen=True)
class Retrieval:
    """The top candidates of a history, or the caller's own in the retriever's order."""

    retriever: "OnnxRetriever"
    catalogue: "Catalogue"

    @classmethod
    def load(cls, folder: Path) -> "Retrieval":
        """Opens ``retriever.onnx`` and ``items.parquet``."""
        from models.retriever.serving import OnnxRetriever
        from preprocessing.catalogue import Catalogue

        return cls(OnnxRetriever.load(folder), Catalogue.load(folder / "items.parquet"))

    def answer(self, request: Tensors) -> Answer:
        """Candidates for the next step, and the whole answer of ``llamarec_retrieval``."""
        history = request[HISTORY_ITEM]
        if request[RETRIEVE][0]:
            candidates = self.retriever.candidates(history, request[EXCLUDED_ITEM])
        else:
            candidates = self.retriever.given(history, request[GIVEN_ITEM])
        ids = _raw_ids(self.catalogue, candidates.items)
        answered, scores, ranks = _cut(request[LIMIT], ids, candidates.probabilities(), candidates.ranks)
        return {
            CANDIDATE_ITEM: candidates.items,
            CANDIDATE_ID: ids,
            CANDIDATE_SCORE: candidates.scores,
            CANDIDATE_RANK: candidates.ranks,
            ITEM_ID: answered,
            SCORE: scores,
            RETRIEVER_RANK: ranks,
        }


@dataclass(frozen=True)
class Prompting:
    """History and candidates to the tokens of one prompt."""

    prompts: "PromptBuilder"

    @classmethod
    def load(cls, folder: Path) -> "Prompting":
        """Opens ``items.parquet``, ``tokenizer.json`` and ``prompt.json``."""
        from models.ranker.prompt import PromptBuilder

        return cls(PromptBuilder.load(folder))

    def answer(self, request: Tensors) -> Answer:
        """The prompt; no tokens when there is no candidate to rank."""
        candidates = request[CANDIDATE_ITEM].tolist()
        return {TOKEN: self.prompts.build(request[HISTORY_ITEM].tolist(), candidates) if candidates else []}


@dataclass(frozen=True)
class Ranking:
    """A prompt to the order of its candidates."""

    ranker: "Ranker"

    @classmethod
    def load(cls, folder: Path) -> "Ranking":
        """Opens the merged model with its letters, fusion weight, runtime and probe prompts."""
        from models.ranker.serving import Ranker

        return cls(Ranker.load(folder))

    def answer(self, request: Tensors) -> Answer:
        """The candidates, best first, cut to LIMIT."""
        ranks = request[CANDIDATE_RANK]
        order, probabilities = self.ranker.rank(request[TOKEN].tolist(), request[CANDIDATE_SCORE], ranks)
        ids, scores, ranks = _cut(request[LIMIT], request[CANDIDATE_ID][order], probabilities, ranks[order])
        return {ITEM_ID: ids, SCORE: scores, RETRIEVER_RANK: ranks}
