"""What a step counts and logs, with a stand-in for Triton's custom metrics that adds up what it is told."""

import json
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from serving.contract import PROBE
from serving.steps.telemetry import CANDIDATES, REQUEST_LOG, TOKENS, Metrics, Telemetry

OWN = {"step": "ranker", "release": "r1"}


class Endpoint:
    """Stands in for the server's metrics endpoint: one value for each name and set of labels."""

    def __init__(self) -> None:
        self.values: Counter[tuple[str, frozenset[tuple[str, str]]]] = Counter()
        self.kinds: dict[str, str] = {}
        self.messages = 0

    def family(self, _: type, *, name: str, description: str, kind: str) -> Any:
        """Called as the constructor of a family of metrics."""
        assert description
        assert name not in self.kinds, "Triton refuses a second family of the same name with other properties"
        self.kinds[name] = kind
        return types.SimpleNamespace(Metric=lambda labels: self.metric(name, labels))

    def metric(self, name: str, labels: Mapping[str, str]) -> Any:
        key = name, frozenset(labels.items())
        assert key not in self.values, "one metric for each set of labels"
        self.values[key] = 0

        def increment(amount: float) -> None:
            assert amount >= 0, "a counter of Triton only grows"
            self.messages += 1
            self.values[key] += amount

        def assign(value: float) -> None:
            assert self.kinds[name] == "gauge"
            self.values[key] = value

        return types.SimpleNamespace(increment=increment, set=assign)

    def value(self, name: str, **labels: str) -> float:
        return self.values[name, frozenset({**OWN, **labels}.items())]

    def samples(self, name: str) -> dict[str, float]:
        """The values of a metric by the label that it has besides those of every metric."""
        return {
            next((value for label, value in labels if label not in OWN), ""): value
            for (metric, labels), value in self.values.items()
            if metric == name
        }


@pytest.fixture
def endpoint(monkeypatch) -> Endpoint:
    """In the place of ``triton_python_backend_utils``, which exists only inside the server; the steps' threads wait."""
    endpoint = Endpoint()
    utils = types.ModuleType("triton_python_backend_utils")
    utils.MetricFamily = type("MetricFamily", (), {"COUNTER": "counter", "GAUGE": "gauge", "__new__": endpoint.family})
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    monkeypatch.setattr("serving.steps.telemetry.FLUSH_SECONDS", 60.0)
    monkeypatch.delenv(REQUEST_LOG, raising=False)
    return endpoint


@pytest.fixture
def open_telemetry(endpoint) -> Iterator[Callable[[], Telemetry]]:
    """Opens a step's telemetry; its thread has ended after the test."""
    opened: list[Telemetry] = []

    def open_one() -> Telemetry:
        opened.append(Telemetry("ranker", "r1"))
        return opened[-1]

    yield open_one
    for telemetry in opened:
        telemetry.close()


@pytest.fixture
def telemetry(open_telemetry) -> Telemetry:
    return open_telemetry()


def request(request_id: str = "a request") -> Any:
    return types.SimpleNamespace(request_id=lambda: request_id)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


# --- counters


def test_a_step_is_visible_before_its_first_request(endpoint, telemetry):
    """An alert on a rate needs a zero to start from, and a dashboard shows which release is loaded: 1, as a gauge."""
    assert endpoint.value("llamarec_answers_total") == 0
    assert endpoint.value("llamarec_release_info") == 1
    assert endpoint.kinds["llamarec_release_info"] == "gauge"
    assert {kind for name, kind in endpoint.kinds.items() if name != "llamarec_release_info"} == {"counter"}


def test_answers_and_what_is_in_them_are_counted(endpoint, telemetry):
    """By hand: three answers with 2 + 0 + 3 unknown items, one of them a fallback because of an overload."""
    telemetry.answered(request(), 0.1, {"unknown_items": 2, "degraded": None})
    telemetry.answered(request(), 0.1, {"unknown_items": 0, "degraded": "Overloaded"})
    telemetry.answered(request(), 0.1, {"unknown_items": 3})
    telemetry.close()
    assert endpoint.value("llamarec_answers_total") == 3
    assert endpoint.value("llamarec_unknown_items_total") == 5
    assert endpoint.samples("llamarec_degraded_answers_total") == {"Overloaded": 1}
    assert endpoint.samples("llamarec_errors_total") == {}


def test_logged_answers_and_lost_ones_are_counted_apart(endpoint, telemetry):
    """What was lost has its reason as a label: 1 + 2 answers found the queue full, and a disk took 4 of 9."""
    for answers, lost in ((1, "full"), (5, None), (2, "full"), (4, "disk")):
        telemetry.logged(answers, lost)
    telemetry.close()
    assert endpoint.value("llamarec_logged_answers_total") == 5
    assert endpoint.samples("llamarec_unlogged_answers_total") == {"full": 3, "disk": 4}


def test_errors_are_counted_by_kind_and_are_no_answers(endpoint, telemetry):
    for kind in ("invalid", "full", "invalid", "internal"):
        telemetry.failed(request(), kind, "ranker: no")
    telemetry.close()
    assert endpoint.samples("llamarec_errors_total") == {"invalid": 2, "full": 1, "internal": 1}
    assert endpoint.value("llamarec_answers_total") == 0
    assert endpoint.samples("llamarec_step_seconds_count") == {}


def test_health_probes_are_not_counted(endpoint, open_telemetry, monkeypatch, capsys):
    """The watch asks each step once a second: neither a metric nor a line in the log, even if every request has one."""
    monkeypatch.setenv(REQUEST_LOG, "1")
    telemetry = open_telemetry()
    telemetry.answered(request(PROBE), 0.1, {"candidates": 20, "unknown_items": 1})
    telemetry.close()
    assert {value for (name, _), value in endpoint.values.items() if name != "llamarec_release_info"} == {0}
    assert lines(capsys) == []


# --- histograms


def test_times_fall_into_cumulative_buckets(endpoint, telemetry):
    """By hand, after Prometheus' definition: a bucket counts all values up to and including its bound, ``+Inf`` all of
    them. Of 0.4 ms, 0.5 ms, 30 ms, 1 s and 20 s two are at most 0.5 ms, three at most 50 ms, four at most 1 s.
    """
    for seconds in (0.0004, 0.0005, 0.03, 1.0, 20.0):
        telemetry.answered(request(), seconds, {})
    telemetry.close()
    assert endpoint.samples("llamarec_step_seconds_bucket") == {
        "0.0005": 2,
        "0.001": 2,
        "0.0025": 2,
        "0.005": 2,
        "0.01": 2,
        "0.025": 2,
        "0.05": 3,
        "0.1": 3,
        "0.25": 3,
        "0.5": 3,
        "1.0": 4,
        "2.5": 4,
        "5.0": 4,
        "10.0": 4,
        "+Inf": 5,
    }
    assert endpoint.value("llamarec_step_seconds_count") == 5
    assert endpoint.value("llamarec_step_seconds_sum") == pytest.approx(21.0309)


def test_later_values_are_added_to_what_was_handed_over(endpoint):
    """Each time only what is new is handed over: two lists of 20 candidates are 1 + 1, not 1 + 2."""
    metrics = Metrics(OWN)
    metrics.observe("llamarec_candidates", 20)
    metrics.flush()
    metrics.observe("llamarec_candidates", 20)
    metrics.close()
    smaller = {str(bound): 0 for bound in CANDIDATES[:-1]}
    assert endpoint.samples("llamarec_candidates_bucket") == {**smaller, "20": 2, "+Inf": 2}
    assert endpoint.value("llamarec_candidates_sum") == 40
    assert endpoint.value("llamarec_candidates_count") == 2


def test_each_value_has_its_own_histogram(endpoint, telemetry):
    """128 tokens are in the bucket of 128, 129 are not; a request without any candidate is counted, at 0."""
    telemetry.answered(request(), 0.1, {"prompt_tokens": 128, "candidates": 0})
    telemetry.answered(request(), 0.1, {"prompt_tokens": 129})
    telemetry.close()
    tokens = endpoint.samples("llamarec_prompt_tokens_bucket")
    assert [tokens[str(bound)] for bound in TOKENS[:4]] == [0, 1, 2, 2]
    assert endpoint.value("llamarec_prompt_tokens_sum") == 257
    assert endpoint.samples("llamarec_candidates_bucket") == {str(bound): 1 for bound in (*CANDIDATES, "+Inf")}
    assert endpoint.value("llamarec_candidates_count") == 1


# --- handing over


def test_nothing_is_lost_between_threads(endpoint, open_telemetry, monkeypatch):
    """Four threads count while a fifth hands over without a pause: 4 times 500 in the end."""
    monkeypatch.setattr("serving.steps.telemetry.FLUSH_SECONDS", 0.0)
    telemetry = open_telemetry()

    def count() -> None:
        for _ in range(500):
            telemetry.answered(request(), 0.25, {})

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    telemetry.close()
    assert endpoint.messages > 18, "more than the one answer, 15 buckets, sum and count of a single time"
    assert endpoint.value("llamarec_answers_total") == 2000
    assert endpoint.value("llamarec_step_seconds_count") == 2000
    assert endpoint.value("llamarec_step_seconds_bucket", le="+Inf") == 2000
    assert endpoint.value("llamarec_step_seconds_sum") == 500


def test_metrics_are_handed_over_by_themselves(endpoint, open_telemetry, monkeypatch):
    """Every few milliseconds here, twice a second in production; a step that is not asked sends nothing."""
    monkeypatch.setattr("serving.steps.telemetry.FLUSH_SECONDS", 0.005)
    telemetry = open_telemetry()
    telemetry.answered(request(), 0.1, {})
    end = time.monotonic() + 5
    while endpoint.value("llamarec_answers_total") == 0 and time.monotonic() < end:
        time.sleep(0.002)
    assert endpoint.value("llamarec_answers_total") == 1
    messages = endpoint.messages
    time.sleep(0.03)
    assert endpoint.messages == messages


def test_closing_hands_over_the_rest_and_ends_the_thread(endpoint, telemetry):
    """The server unloads a model between two flushes: what was counted since the last one must not be lost."""
    before = threading.active_count()
    telemetry.answered(request(), 0.1, {})
    assert endpoint.value("llamarec_answers_total") == 0
    telemetry.close()
    assert endpoint.value("llamarec_answers_total") == 1
    assert threading.active_count() == before - 1


# --- the log


def test_every_request_leaves_a_line_when_it_is_wanted(open_telemetry, monkeypatch, capsys):
    """A line of JSON with the request's id, so that the four steps' lines can be joined."""
    monkeypatch.setenv(REQUEST_LOG, "1")
    telemetry = open_telemetry()
    before = time.time()
    telemetry.answered(request("id 7"), 0.1234567, {"user": "ünknown", "candidates": 20, "degraded": None})
    telemetry.failed(request("id 8"), "invalid", "ranker: HISTORY holds\ntwo lines")
    answered, failed = lines(capsys)
    assert before - 0.001 <= answered.pop("time") <= failed.pop("time") <= time.time() + 0.001
    assert answered == {
        **OWN,
        "request": "id 7",
        "event": "answered",
        "seconds": 0.123457,
        "user": "ünknown",
        "candidates": 20,
        "degraded": None,
    }
    assert failed == {**OWN, "request": "id 8", "event": "invalid", "message": "ranker: HISTORY holds\ntwo lines"}


def test_only_failures_of_our_own_are_logged_otherwise(telemetry, capsys):
    """Bad input and full queues are the callers' doing and would fill the log; an exception is not."""
    telemetry.answered(request(), 0.1, {})
    for kind in ("invalid", "cancelled", "full", "late", "internal"):
        telemetry.failed(request(), kind, f"ranker: {kind}")
    assert [(line["event"], line["message"]) for line in lines(capsys)] == [("internal", "ranker: internal")]
