"""What the Triton steps do: decode a request, call what offline evaluation calls too, encode the answer.

Every ``model_repository/<step>/1/model.py`` is a thin adapter over one class here. Requests that Triton hands over
together are answered one by one, so that an answer never depends on who shares its batch and one bad request spoils no
other.
"""

import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from client.contract import (
    CANDIDATE_ID,
    CANDIDATE_ITEM,
    CANDIDATE_RANK,
    CANDIDATE_SCORE,
    CANDIDATES,
    DEGRADED,
    DEGRADED_REASONS,
    EXCLUDE,
    EXCLUDED_ITEM,
    GIVEN_ITEM,
    HISTORY,
    HISTORY_ITEM,
    ITEM_ID,
    LIMIT,
    LINE_END,
    QUEUED,
    RETRIEVE,
    RETRIEVER_RANK,
    SCORE,
    STEP_SPECS,
    STEPS,
    TOKEN,
    TOP_K,
    USER_ID,
    TensorSpec,
)
from export.telemetry import Telemetry
from export.waiting import Entrance, FullError, GivenUpError, LateError, Turn, meeting_place, now
from preprocessing.artifacts import read_manifest
from preprocessing.errors import InputError

if TYPE_CHECKING:  # each step's process imports only what that step needs: torch alone costs 144 MB
    from models.ranker.inference.ranker import Ranker
    from models.ranker.prompt import PromptBuilder
    from models.retriever.inference.onnx_retriever import OnnxRetriever
    from preprocessing.catalogue import Catalogue
    from preprocessing.features import FeatureEncoder

ARTIFACT = "artifact"
ARTIFACT_KIND = "step"
REMEDY = "llamarec export"
SCORES_PARAMETER = "RETRIEVER_SCORES"
"""In the retriever's configuration: the model of this server that it has its scores from, instead of its own."""
QUEUE_PARAMETER = "QUEUE_SECONDS"
"""In prompt_builder's and the ranker's configuration: the longest that a prompt may have waited when its turn comes."""
SIZE_PARAMETER = "QUEUE_SIZE"
"""In prompt_builder's configuration: the most prompts that may wait for the ranker."""
CACHE_PARAMETER = "RANK_CACHE"
"""In the ranker's configuration: how many prompts' answers it remembers."""
DTYPES: Mapping[str, type] = {"STRING": object, "INT32": np.int32, "INT64": np.int64, "FP32": np.float32}

Tensors = Mapping[TensorSpec, NDArray[Any]]
"""Arrays [n] of one request, without the batch dimension; an optional tensor that was not sent is not in it."""
Answer = Mapping[TensorSpec, ArrayLike]


def artifact_folder(step: str, arguments: Mapping[str, str]) -> Path:
    """The exported files of a step, as given by the arguments of Triton's ``initialize``.

    The model's name is the step's, and a suffix where several releases stand in one repository.

    Raises:
        InputError: nothing is exported, or another step's files are from another export.
    """
    version = arguments["model_version"]
    suffix = arguments["model_name"].removeprefix(step)
    repository = Path(arguments["model_repository"]).parent
    folder = Path(arguments["model_repository"]) / version / ARTIFACT
    release = _release(folder)
    for other in STEPS:
        sibling = repository / (other + suffix) / version / ARTIFACT
        if other != step and sibling.exists() and _release(sibling) != release:
            raise InputError(f"{step} and {other} are from different exports: half exported, run `{REMEDY}`")
    return folder


def _release(folder: Path) -> str:
    return str(read_manifest(folder, ARTIFACT_KIND, REMEDY).facts["release"])


def parameter(arguments: Mapping[str, str], name: str) -> str | None:
    """A parameter of the model's configuration, from the arguments of Triton's ``initialize``."""
    parameters = json.loads(arguments["model_config"]).get("parameters", {})
    value: str | None = parameters.get(name, {}).get("string_value")
    return value


class Step(Protocol):
    """What every step's class has."""

    def answer(self, request: Tensors) -> Answer:
        """The step's outputs for its inputs."""


class Worker:
    """One step inside the server: what ``model.py`` hands Triton's calls to."""

    def __init__(self, step: str, arguments: Mapping[str, str], load: Callable[[Path], Step]) -> None:
        """Args:
        step: the step's name.
        arguments: those of Triton's ``initialize``.
        load: opens the step's files.

        Raises:
            InputError: they are not there, or not of one export.
        """
        folder = artifact_folder(step, arguments)
        self._step = step
        self._loaded = load(folder)
        release = arguments["model_name"].removeprefix(step).removeprefix("_") or _release(folder)
        self._telemetry = Telemetry(step, release)
        self._line = place_in_line(step, arguments)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Triton's ``execute``."""
        return answer_each(self._step, self._loaded.answer, requests, self._telemetry, self._line)

    def finalize(self) -> None:
        """Triton's ``finalize``."""
        self._telemetry.close()
        if self._line:
            self._line.close()


def place_in_line(step: str, arguments: Mapping[str, str]) -> Entrance | Turn | None:
    """What limits the wait for the ranker at this step, from the arguments of Triton's ``initialize``; else None."""
    seconds, size = parameter(arguments, QUEUE_PARAMETER), parameter(arguments, SIZE_PARAMETER)
    if seconds is None:
        return None
    folder = meeting_place(arguments["model_name"].removeprefix(step))
    return Turn(folder, float(seconds)) if size is None else Entrance(folder, int(size), float(seconds))


def answer_each(
    step: str,
    answer: Callable[[Tensors], Answer],
    requests: Sequence[Any],
    telemetry: Telemetry | None = None,
    line: Entrance | Turn | None = None,
) -> list[Any]:
    """Triton's ``execute``: one response for each request, in order.

    Bad input becomes INVALID_ARGUMENT and any other failure INTERNAL, both naming the step. Whom the line before the
    ranker does not admit gets UNAVAILABLE, and costs neither a prompt nor a pass.

    Args:
        step: the step's name.
        answer: what it does with one request.
        requests: Triton's.
        telemetry: where answers and failures are counted.
        line: this step's place in the line before the ranker.
    """
    return [_answer_one(step, answer, request, telemetry, line) for request in requests]


def _answer_one(
    step: str,
    answer: Callable[[Tensors], Answer],
    request: Any,
    telemetry: Telemetry | None,
    line: Entrance | Turn | None,
) -> Any:
    import triton_python_backend_utils as pb_utils  # exists only inside the server

    started = time.perf_counter()
    try:
        asked = _read(request, STEP_SPECS[step].inputs)
        if line:
            line.admit(request, asked)
        answered = answer(asked)
        wanted = request.requested_output_names()
        tensors = [
            pb_utils.Tensor(spec.name, np.asarray(answered[spec], DTYPES[spec.data_type])[np.newaxis])
            for spec in STEP_SPECS[step].outputs
            if spec.name in wanted
        ]
        if telemetry:
            telemetry.answered(request, time.perf_counter() - started, _facts(step, request, asked, answered))
        return pb_utils.InferenceResponse(output_tensors=tensors)
    except InputError as error:
        kind, code, message = "invalid", pb_utils.TritonError.INVALID_ARG, f"{step}: {error}"
    except GivenUpError:
        kind, code, message = "cancelled", pb_utils.TritonError.CANCELLED, f"{step}: the caller gave up"
    except FullError as error:
        kind, code, message = "full", pb_utils.TritonError.UNAVAILABLE, f"{step}: {error}"
    except LateError as error:
        kind, code, message = "late", pb_utils.TritonError.UNAVAILABLE, f"{step}: {error}"
    except Exception as error:
        pb_utils.Logger.log_error(traceback.format_exc())
        kind, code, message = "internal", pb_utils.TritonError.INTERNAL, f"{step}: {type(error).__name__}: {error}"
    if telemetry:
        telemetry.failed(request, kind, message)
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(message, code))


def _facts(step: str, request: Any, asked: Tensors, answered: Answer) -> dict[str, Any]:
    """What is worth counting and logging about an answer."""
    if step == "features":
        user = asked[USER_ID][0].decode(errors="replace") if USER_ID in asked else None
        known = len(np.asarray(answered[HISTORY_ITEM]))
        return {"user": user, "history": len(asked[HISTORY]), "unknown_items": len(asked[HISTORY]) - known}
    if step == "retriever":
        parameters = request.parameters()
        degraded = json.loads(parameters).get(DEGRADED) if parameters else None
        if degraded is not None and degraded not in DEGRADED_REASONS:
            degraded = "other"  # each value of a label is a series of its own, and the caller chose this one
        return {"candidates": len(np.asarray(answered[CANDIDATE_ITEM])), "degraded": degraded}
    if step == "prompt_builder":
        return {"prompt_tokens": len(np.asarray(answered[TOKEN]))}
    return {}


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

    @classmethod
    def load(cls, folder: Path) -> "Features":
        """Opens ``items.parquet``."""
        from preprocessing.catalogue import Catalogue
        from preprocessing.features import FeatureEncoder

        return cls(FeatureEncoder(Catalogue.load(folder / "items.parquet")))

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
        return {
            HISTORY_ITEM: encoded.history,
            EXCLUDED_ITEM: encoded.excluded,
            GIVEN_ITEM: encoded.given,
            RETRIEVE: [encoded.retrieve],
            LIMIT: [encoded.limit],
        }


@dataclass(frozen=True)
class ServedScores:
    """The retriever's graph as another model of this server, called as an ONNX session is."""

    model: str

    def run(self, outputs: None, feeds: Mapping[str, NDArray[np.int64]]) -> list[NDArray[np.float32]]:
        """``scores`` [1, items + 1] of ``items`` [1, length].

        Raises:
            RuntimeError: the model did not answer.
        """
        import triton_python_backend_utils as pb_utils

        tensors = [pb_utils.Tensor(name, array) for name, array in feeds.items()]
        memory = pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0)
        request = pb_utils.InferenceRequest(
            model_name=self.model, requested_output_names=["scores"], inputs=tensors, preferred_memory=memory
        )
        response = request.exec()
        if response.has_error():
            raise RuntimeError(f"{self.model}: {response.error().message()}")
        return [pb_utils.get_output_tensor_by_name(response, "scores").as_numpy()]


@dataclass(frozen=True)
class Retrieval:
    """The top candidates of a history, or the caller's own in the retriever's order."""

    retriever: "OnnxRetriever"
    catalogue: "Catalogue"

    @classmethod
    def load(cls, folder: Path, scores_model: str | None = None) -> "Retrieval":
        """Opens ``retriever.onnx`` and ``items.parquet``.

        Args:
            folder: what `llamarec export` wrote.
            scores_model: the model of this server that runs the graph; without it, this process does.
        """
        from models.retriever.inference.onnx_retriever import OnnxRetriever
        from preprocessing.catalogue import Catalogue

        served = ServedScores(scores_model) if scores_model else None
        return cls(OnnxRetriever.load(folder, served), Catalogue.load(folder / "items.parquet"))

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
        if not candidates:
            return {TOKEN: [], LINE_END: [], QUEUED: [now()]}
        prompt = self.prompts.build(request[HISTORY_ITEM].tolist(), candidates)
        return {TOKEN: prompt.tokens, LINE_END: prompt.line_ends, QUEUED: [now()]}


@dataclass(frozen=True)
class Ranking:
    """A prompt to the order of its candidates."""

    ranker: "Ranker"
    remembered: int = 0
    """How many prompts' answers are kept, those asked last: prompt, scores and ranks determine the answer."""

    @classmethod
    def load(cls, folder: Path, remembered: int = 0) -> "Ranking":
        """Opens the merged model with its verbalizer, fusion weight, runtime and probe prompts."""
        from models.ranker.inference.ranker import Ranker

        return cls(Ranker.load(folder), remembered)

    @cached_property
    def _rank(self) -> Callable[[bytes, bytes, bytes, bytes], tuple[NDArray[np.int64], NDArray[np.float32]]]:
        from models.ranker.prompt import Prompt

        @lru_cache(maxsize=self.remembered)
        def rank(
            tokens: bytes, line_ends: bytes, scores: bytes, ranks: bytes
        ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
            prompt = Prompt(*(np.frombuffer(part, np.int32).tolist() for part in (tokens, line_ends)))
            return self.ranker.rank(prompt, np.frombuffer(scores, np.float32), np.frombuffer(ranks, np.int32))

        return rank

    def answer(self, request: Tensors) -> Answer:
        """The candidates, best first, cut to LIMIT."""
        given = (request[spec].tobytes() for spec in (TOKEN, LINE_END, CANDIDATE_SCORE, CANDIDATE_RANK))
        order, probabilities = self._rank(*given)
        ranks = request[CANDIDATE_RANK]
        ids, scores, ranks = _cut(request[LIMIT], request[CANDIDATE_ID][order], probabilities, ranks[order])
        return {ITEM_ID: ids, SCORE: scores, RETRIEVER_RANK: ranks}
