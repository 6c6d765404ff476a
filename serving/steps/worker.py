"""The glue between Triton and a step: decodes each request, has the step answer it, encodes the answer.

Every ``model_repository/<step>/1/model.py`` hands Triton's calls to a :class:`Worker`. Requests that Triton hands over
together are answered one by one, so that an answer never depends on the other requests of a batch and one bad request
does not spoil the others. Only a :class:`serving.steps.step.JointStep` sees all of them: each is decoded and admitted,
then all are answered, then each answer is encoded.
"""

import json
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from llamarec_client.contract import TensorSpec
from preprocessing.errors import InputError
from serving.contract import PACKED, STAND_IN, STEP_SPECS, packed_input
from serving.layout import export_id, loaded_artifact
from serving.steps.answers import AnswerLog, open_log
from serving.steps.garbage import GarbageCollector
from serving.steps.packing import DTYPES, PACKINGS
from serving.steps.presence import DeadError, DeadStep, Presence, open_presence
from serving.steps.ranker_queue import Admission, FullError, GivenUpError, LateError, RankerTurn, open_queue
from serving.steps.step import Answer, CheckedStep, JointStep, Step, Tensors, degraded_reason
from serving.steps.telemetry import Telemetry
from stores.store import StoreError

REFUSALS: Mapping[type[Exception], tuple[str, str]] = {
    InputError: ("invalid", "INVALID_ARG"),
    GivenUpError: ("cancelled", "CANCELLED"),
    FullError: ("full", "UNAVAILABLE"),
    LateError: ("late", "UNAVAILABLE"),
    DeadError: ("dead", "UNAVAILABLE"),
    StoreError: ("store", "UNAVAILABLE"),
}
"""Kind under which a refusal is counted, and Triton's code for it; any other exception is ``internal``, INTERNAL."""


class Worker:
    """One step inside the server."""

    def __init__(
        self,
        name: str,
        step: Step | JointStep,
        telemetry: Telemetry | None = None,
        queue: Admission | RankerTurn | None = None,
        answers: AnswerLog | None = None,
        presence: Presence | None = None,
        garbage: GarbageCollector | None = None,
    ) -> None:
        """Run ``step`` as the Triton model of this name.

        Args:
            name: of the step.
            step: answers the requests.
            telemetry: counts answers and failures.
            queue: admits requests to the ranker's queue, or takes their turn.
            answers: keeps the answers of the ensembles that end with this step.
            presence: shows that this process lives, and sees whether the next step does.
            garbage: collects Python's garbage between requests.
        """
        self._name = name
        self._step = step
        # Such a check of a protocol takes a tenth of a millisecond: not for each request.
        self._together = partial(self._respond_together, step) if isinstance(step, JointStep) else None
        self._checked = step if isinstance(step, CheckedStep) else None
        self._inputs = Inputs(name)
        self._telemetry = telemetry
        self._queue = queue
        self._answers = answers
        self._presence = presence
        self._garbage = garbage

    @classmethod
    def open(cls, name: str, arguments: Mapping[str, str], load: Callable[[Path], Step | JointStep]) -> "Worker":
        """Load a step's exported files and connect it to the metrics, the ranker's queue and the log of answers.

        An instance that stands in for a dead step loads nothing, and refuses every request.

        Args:
            name: of the step.
            arguments: those of Triton's ``initialize``.
            load: opens the step's files.

        Raises:
            InputError: they are missing, or not of one export.
        """
        if arguments.get("model_instance_name", "").startswith(f"{STAND_IN}_"):
            return cls(name, DeadStep(name))
        folder = loaded_artifact(name, arguments)
        step = load(folder)
        release = arguments["model_name"].removeprefix(name).removeprefix("_") or export_id(folder)
        telemetry = Telemetry(name, release)
        answers = open_log(name, folder, release, telemetry.logged)
        queue = open_queue(name, arguments)
        presence = open_presence(name, arguments)
        return cls(name, step, telemetry, queue, answers, presence, GarbageCollector())

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer Triton's ``execute``: one response for each request, in order.

        Bad input becomes INVALID_ARGUMENT and any unforeseen failure INTERNAL, both naming the step. A request that
        the ranker's queue does not admit, or whose next step is dead, gets UNAVAILABLE, and costs neither a prompt nor
        a pass.
        """
        if self._garbage is None:
            return self._respond_all(requests)
        with self._garbage.held_off():
            return self._respond_all(requests)

    def finalize(self) -> None:
        """Answer Triton's ``finalize``: write the last answers, hand over the last metrics and leave the queue."""
        if self._answers:
            self._answers.close()
        if self._telemetry:
            self._telemetry.close()
        for opened in (self._queue, self._presence, self._garbage):
            if opened:
                opened.close()

    def _respond_all(self, requests: Sequence[Any]) -> list[Any]:
        if self._together is not None:
            return self._together(requests)
        return [self._respond(request, partial(self._work, request), time.perf_counter()) for request in requests]

    def _respond_together(self, step: JointStep, requests: Sequence[Any]) -> list[Any]:
        started = time.perf_counter()
        read = [_outcome(partial(self._read, request)) for request in requests]
        answers = iter(step.answer_all([found for found in read if not isinstance(found, Exception)]))
        works = [partial(_result, found, found if isinstance(found, Exception) else next(answers)) for found in read]
        return [self._respond(request, work, started) for request, work in zip(requests, works, strict=True)]

    def _work(self, request: Any) -> tuple[Tensors, Answer]:
        tensors = self._read(request)
        return tensors, cast(Step, self._step).answer(tensors)

    def _read(self, request: Any) -> Tensors:
        tensors = self._inputs.read(request)
        if self._presence:
            self._presence.check(request)
        if self._queue:
            self._queue.admit(request, tensors)
        return tensors

    def _respond(self, request: Any, work: Callable[[], tuple[Tensors, Answer]], started: float) -> Any:
        try:
            return self._encode(request, *work(), started)
        except tuple(REFUSALS) as error:
            kind, code = next(refusal for known, refusal in REFUSALS.items() if isinstance(error, known))
            return self._refuse(request, kind, code, str(error))
        except Exception as error:
            import triton_python_backend_utils as pb_utils  # exists only inside the server

            pb_utils.Logger.log_error(traceback.format_exc())
            return self._refuse(request, "internal", "INTERNAL", f"{type(error).__name__}: {error}")

    def _encode(self, request: Any, tensors: Tensors, answer: Answer, started: float) -> Any:
        import triton_python_backend_utils as pb_utils

        wanted = request.requested_output_names()
        if self._checked:
            self._checked.check(answer, wanted)
        outputs = [pb_utils.Tensor(name, array[np.newaxis]) for name, array in self._arrays(tensors, answer, wanted)]
        if self._telemetry or self._answers:
            parameters = _parameters(request)
        if self._telemetry:
            self._telemetry.answered(
                request, time.perf_counter() - started, self._step.facts(tensors, answer, parameters)
            )
        if self._answers:
            self._answers.add(request.request_id(), wanted, tensors, answer, degraded_reason(parameters))
        return pb_utils.InferenceResponse(output_tensors=outputs)

    def _arrays(self, tensors: Tensors, answer: Answer, wanted: Collection[str]) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield the name and the array [n] of each output that is asked for."""
        for spec in STEP_SPECS[self._name].outputs:
            if spec.name in wanted:
                yield spec.name, np.asarray(answer[spec], DTYPES[spec.data_type])
        packed = PACKED.get(self._name)
        if packed is not None and packed.name in wanted:
            packing, handed_on = PACKINGS[packed.name], {**tensors, **answer}
            # A caller who lists no outputs is taken to want all of them, also if he asks this step alone.
            if packing.holds(handed_on):
                yield packed.name, packing.pack(handed_on)

    def _refuse(self, request: Any, kind: str, code: str, message: str) -> Any:
        import triton_python_backend_utils as pb_utils

        message = f"{self._name}: {message}"
        if self._telemetry:
            self._telemetry.failed(request, kind, message)
        error = pb_utils.TritonError(message, getattr(pb_utils.TritonError, code))
        return pb_utils.InferenceResponse(output_tensors=[], error=error)


def _parameters(request: Any) -> Mapping[str, Any]:
    """Return the request's parameters, of which most requests have none."""
    text = request.parameters()
    return json.loads(text) if len(text) > len("{}") else {}


def _outcome(read: Callable[[], Tensors]) -> Tensors | Exception:
    try:
        return read()
    except Exception as error:
        return error


def _result(tensors: Tensors | Exception, answer: Answer | Exception) -> tuple[Tensors, Answer]:
    """Return a request with its answer, or raise the error in place of either."""
    if isinstance(tensors, Exception):
        raise tensors
    if isinstance(answer, Exception):
        raise answer
    return tensors, answer


class Inputs:
    """Reads the inputs of one step from Triton's requests.

    Args:
        step: name of the step.
    """

    def __init__(self, step: str) -> None:
        self._specs = STEP_SPECS[step].inputs
        self._packed = packed_input(step)

    def read(self, request: Any) -> Tensors:
        """Return the tensors of a request without the batch dimension. Packed ones hold those of later steps too.

        Raises:
            InputError: the request holds more than one user.
        """
        import triton_python_backend_utils as pb_utils

        if self._packed is not None:
            tensor = pb_utils.get_input_tensor_by_name(request, self._packed.name)
            if tensor is not None:
                return PACKINGS[self._packed.name].unpack(_only_row(self._packed, tensor))
        tensors: dict[TensorSpec, NDArray[Any]] = {}
        for spec in self._specs:
            tensor = pb_utils.get_input_tensor_by_name(request, spec.name)
            if tensor is not None:
                tensors[spec] = _only_row(spec, tensor)
        return tensors


def _only_row(spec: TensorSpec, tensor: Any) -> NDArray[Any]:
    """Return the only row of a Triton tensor [1, n].

    Raises:
        InputError: the request holds more than one user.
    """
    array: NDArray[Any] = tensor.as_numpy()
    if len(array) != 1:
        raise InputError(f"{spec.name} holds {len(array)} users: send one request for each")
    row: NDArray[Any] = array[0]
    return row
