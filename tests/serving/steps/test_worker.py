"""Triton's glue where a step counts and queues: what is admitted, what is told to telemetry, and what is opened."""

import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamarec_client.contract import EXCLUDE, HISTORY, USER_ID
from preprocessing.artifacts import new_artifact
from preprocessing.errors import InputError
from serving.contract import EXCLUDED_ITEM, GIVEN_ITEM, HISTORY_ITEM, LIMIT, RETRIEVE
from serving.layout import KIND
from serving.steps.presence import DeadError
from serving.steps.ranker_queue import FullError, GivenUpError, LateError
from serving.steps.worker import Worker

ANSWER = {HISTORY_ITEM: [1, 2], EXCLUDED_ITEM: [], GIVEN_ITEM: [], RETRIEVE: [1], LIMIT: [0]}


@pytest.fixture(autouse=True)
def triton(monkeypatch) -> list[str]:
    """Stands in for ``triton_python_backend_utils``, which exists only inside the server; gives what was logged."""
    logged: list[str] = []
    utils = types.ModuleType("triton_python_backend_utils")
    utils.Tensor = lambda name, array: types.SimpleNamespace(name=name, as_numpy=lambda: array)
    utils.TritonError = lambda message, code: (code, message)
    for code in ("INVALID_ARG", "CANCELLED", "UNAVAILABLE", "INTERNAL"):
        setattr(utils.TritonError, code, code)
    utils.InferenceResponse = lambda output_tensors, error=None: types.SimpleNamespace(
        tensors={tensor.name: tensor.as_numpy().tolist() for tensor in output_tensors}, error=error
    )
    utils.get_input_tensor_by_name = lambda request, name: request.tensors.get(name)
    utils.Logger = types.SimpleNamespace(log_error=logged.append)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    return logged


def request(parameters: str = "", **tensors: list[bytes]) -> Any:
    """A request for one user, as the backend hands it over: its parameters are a text of JSON, or empty."""
    arrays = {name: np.array([values], dtype=object) for name, values in tensors.items()}
    return types.SimpleNamespace(
        tensors={name: types.SimpleNamespace(as_numpy=lambda array=array: array) for name, array in arrays.items()},
        requested_output_names=lambda: ["HISTORY_ITEM", "LIMIT"],
        parameters=lambda: parameters,
    )


class Step:
    """Answers two items to everybody, or fails as a test says; remembers what it was asked."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure, self.asked, self.told = failure, [], []

    def answer(self, tensors: Mapping) -> Mapping:
        self.asked.append({spec.name: values.tolist() for spec, values in tensors.items()})
        if self.failure:
            raise self.failure
        return ANSWER

    def facts(self, tensors: Mapping, answer: Mapping, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
        self.told.append((set(tensors), answer, parameters))
        return {"history": len(tensors[HISTORY])}


class Counting:
    """Stands in for telemetry."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def answered(self, request: Any, seconds: float, facts: Mapping[str, Any]) -> None:
        assert 0 <= seconds < 5
        self.events.append(("answered", facts))

    def failed(self, request: Any, kind: str, message: str) -> None:
        self.events.append((kind, message))

    def logged(self, answers: int, lost: str | None = None) -> None:
        self.events.append(("logged", answers, lost))

    def close(self) -> None:
        self.events.append("closed")


class Queue:
    """Stands in for an end of the ranker's queue."""

    def __init__(self, refusal: Exception | None = None) -> None:
        self.refusal, self.admitted, self.closed = refusal, [], False

    def admit(self, request: Any, tensors: Mapping) -> None:
        self.admitted.append({spec.name for spec in tensors})
        if self.refusal:
            raise self.refusal

    def close(self) -> None:
        self.closed = True


class Log:
    """Stands in for the log of answers."""

    def __init__(self, events: list[Any] | None = None) -> None:
        self.events = [] if events is None else events

    def add(self, *answer: Any) -> None:
        self.events.append(answer)

    def close(self) -> None:
        self.events.append("log closed")


def test_an_answer_is_counted_with_its_facts():
    """The step is handed arrays without the batch dimension; facts see inputs, outputs and the request's parameters."""
    step, telemetry = Step(), Counting()
    asked = request('{"degraded": "Overloaded"}', HISTORY=[b"a", b"b"], USER_ID=[b"u"])
    (response,) = Worker("features", step, telemetry).execute([asked])
    assert response.error is None
    assert response.tensors == {"HISTORY_ITEM": [[1, 2]], "LIMIT": [[0]]}
    assert step.asked == [{"HISTORY": [b"a", b"b"], "USER_ID": [b"u"]}]
    assert step.told == [({HISTORY, USER_ID}, ANSWER, {"degraded": "Overloaded"})]
    assert telemetry.events == [("answered", {"history": 2})]


def test_a_request_without_parameters_has_none():
    """Triton hands over an empty text, which is no JSON."""
    step = Step()
    Worker("features", step, Counting()).execute([request(HISTORY=[])])
    assert step.told == [({HISTORY}, ANSWER, {})]


@pytest.mark.parametrize(
    ("failure", "kind", "code", "message"),
    [
        (InputError("HISTORY is too long"), "invalid", "INVALID_ARG", "features: HISTORY is too long"),
        (GivenUpError(), "cancelled", "CANCELLED", f"features: {GivenUpError()}"),
        (FullError("queue full"), "full", "UNAVAILABLE", "features: queue full"),
        (LateError("queue timeout"), "late", "UNAVAILABLE", "features: queue timeout"),
        (DeadError("step ranker is dead"), "dead", "UNAVAILABLE", "features: step ranker is dead"),
        (ZeroDivisionError("by zero"), "internal", "INTERNAL", "features: ZeroDivisionError: by zero"),
    ],
    ids=lambda given: type(given).__name__ if isinstance(given, Exception) else None,
)
def test_each_kind_of_failure_is_counted_under_its_name(triton, failure, kind, code, message):
    """The table of the serving documentation: who has to act decides the code, and the text names the step. Only an
    unforeseen failure leaves a traceback in the server's log.
    """
    telemetry = Counting()
    (response,) = Worker("features", Step(failure), telemetry).execute([request(HISTORY=[])])
    assert response.error == (code, message)
    assert telemetry.events == [(kind, message)]
    assert len(triton) == (kind == "internal")
    assert all("ZeroDivisionError: by zero" in text and "Traceback" in text for text in triton)


@pytest.mark.parametrize("refusal", [FullError("queue full"), LateError("queue timeout"), GivenUpError()])
def test_what_the_queue_does_not_admit_costs_no_work(refusal):
    """It is asked with the request's tensors before the step is; the next request has its own chance."""
    step, queue, telemetry = Step(), Queue(refusal), Counting()
    worker = Worker("features", step, telemetry, queue)
    worker.execute([request(HISTORY=[b"a"], EXCLUDE=[])])
    assert step.asked == []
    assert queue.admitted == [{HISTORY.name, EXCLUDE.name}]
    queue.refusal = None
    (response,) = worker.execute([request(HISTORY=[b"a"])])
    assert response.error is None
    assert len(step.asked) == 1


def test_a_request_that_cannot_be_passed_on_takes_no_place_in_the_queue():
    """It is refused before it is admitted, and costs no work."""
    step, queue, presence = Step(), Queue(), Queue()

    def check(request: Any) -> None:
        raise DeadError("step retriever is dead")

    presence.check = check
    (response,) = Worker("features", step, Counting(), queue, presence=presence).execute([request(HISTORY=[])])
    assert response.error == ("UNAVAILABLE", "features: step retriever is dead")
    assert (step.asked, queue.admitted) == ([], [])


class Together:
    """Answers all requests at once, the second of those that it is given with an error."""

    def __init__(self) -> None:
        self.asked: list[list[bytes]] = []

    def answer_all(self, requests: list[Mapping]) -> list[Mapping | Exception]:
        self.asked.append([tensors[HISTORY][0] for tensors in requests])
        return [InputError("no") if place == 1 else ANSWER for place in range(len(requests))]

    def facts(self, tensors: Mapping, answer: Mapping, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
        return {}


def test_a_joint_step_is_given_what_the_queue_admits():
    """Of four requests, the second is late and the second of the others is refused: each gets its own answer."""
    step = Together()

    class Second(Queue):
        def admit(self, request: Any, tensors: Mapping) -> None:
            super().admit(request, tensors)
            if len(self.admitted) == 2:
                raise LateError("late")

    requests = [request(HISTORY=[name]) for name in (b"a", b"b", b"c", b"d")]
    responses = Worker("features", step, queue=Second()).execute(requests)
    assert step.asked == [[b"a", b"c", b"d"]]
    assert [response.error for response in responses] == [
        None,
        ("UNAVAILABLE", "features: late"),
        ("INVALID_ARG", "features: no"),
        None,
    ]


def test_a_failure_while_counting_is_an_answer_too():
    """Facts are computed inside the request: an error there is that request's, and the next one is answered."""
    step, told = Step(), []

    def facts(tensors: Mapping, answer: Mapping, parameters: Mapping) -> Mapping:
        told.append(parameters)
        if len(told) == 1:
            raise KeyError("lost")
        return {}

    step.facts = facts
    first, second = Worker("features", step, Counting()).execute([request(HISTORY=[]), request(HISTORY=[])])
    assert first.error == ("INTERNAL", "features: KeyError: 'lost'")
    assert second.error is None


def test_an_answer_is_logged_and_a_refusal_is_not():
    """The log gets what the request asked for and held, the whole answer, and why the client degraded."""
    log = Log()
    asked = request('{"degraded": "Overloaded"}', HISTORY=[b"a"])
    asked.request_id = lambda: "id"
    Worker("features", Step(), answers=log).execute([asked])
    Worker("features", Step(InputError("no")), answers=log).execute([request(HISTORY=[])])
    (added,) = log.events
    assert (*added[:2], set(added[2]), *added[3:]) == ("id", ["HISTORY_ITEM", "LIMIT"], {HISTORY}, ANSWER, "Overloaded")


def test_finalizing_hands_over_answers_and_metrics_and_leaves_the_queue():
    """Triton calls it when a model is unloaded. The last answers are counted before the metrics are handed over; a step
    that has none of these ends as quietly.
    """
    telemetry, queue, presence = Counting(), Queue(), Queue()
    Worker("features", Step(), telemetry, queue, Log(telemetry.events), presence).finalize()
    assert telemetry.events == ["log closed", "closed"]
    assert queue.closed
    assert presence.closed
    Worker("features", Step()).finalize()


# --- opening


def exported(repository: Path, model: str) -> dict[str, str]:
    """The files of one step, and what Triton hands to ``initialize`` for it, as seen with the wheel's server."""
    folder = repository / model / "1" / "artifact"
    with new_artifact(folder, KIND, options={}, inputs={}, facts={"release": "0123abcd"}) as partial:
        (partial / "file").write_text("content")
    return {
        "model_name": model,
        "model_repository": str(repository / model),
        "model_config": json.dumps({"parameters": {"OTHER": {"string_value": "1"}}}),
    }


@pytest.mark.parametrize(("model", "release"), [("features", "0123abcd"), ("features_r3", "r3")])
def test_metrics_name_the_release(tmp_path, monkeypatch, model, release):
    """The release's name where several share a repository, else the id of the export; the step's name has no suffix."""
    opened = []
    monkeypatch.setattr("serving.steps.worker.Telemetry", lambda *given: opened.append(given) or Counting())
    monkeypatch.setattr("serving.steps.worker.open_presence", lambda *given: None)
    arguments = exported(tmp_path, model)
    step = Step()

    def load(folder: Path) -> Step:
        opened.append(folder)
        return step

    worker = Worker.open("features", arguments, load)
    assert opened == [tmp_path / model / "1" / "artifact", ("features", release)]
    (response,) = worker.execute([request(HISTORY=[])])
    worker.finalize()  # else its thread would go on to collect garbage in all tests that follow
    assert response.error is None
    assert len(step.asked) == 1


def test_a_step_without_files_is_not_opened(tmp_path, monkeypatch):
    """Nothing is loaded and no metric is made; the error in the server's log says what to run."""
    monkeypatch.setattr("serving.steps.worker.Telemetry", lambda *given: pytest.fail("nothing to count"))
    arguments = {"model_name": "features", "model_repository": str(tmp_path / "features"), "model_config": "{}"}
    with pytest.raises(InputError, match="llamarec export"):
        Worker.open("features", arguments, lambda folder: pytest.fail("nothing to load"))


def test_a_stand_in_loads_nothing_and_refuses_everything():
    """Triton names an instance after its group. Without the files of its step it is there at once."""
    arguments = {"model_name": "ranker_r1", "model_instance_name": "stand_in_0"}
    worker = Worker.open("ranker", arguments, lambda folder: pytest.fail("nothing to load"))
    (response,) = worker.execute([request()])
    code, message = response.error
    assert code == "UNAVAILABLE"
    assert message.startswith("ranker: step ranker is dead: `llamarec serve` restarts it within seconds")
    worker.finalize()
