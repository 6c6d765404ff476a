"""A request's time in each step, from statistics whose figures are known."""

import types

import pytest
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import InferenceServerException

from llamarec_client.errors import ServerUnavailable
from llamarec_client.recommender import RecommenderClient
from serving.contract import STEPS
from serving.server.step_times import StepTime, StepTotal, ensemble_steps, mean_times, step_totals


def statistics(count: int, **nanoseconds: int) -> service_pb2.ModelStatistics:
    """One version's statistics in Triton's own message; a duration it does not name is 0."""
    durations = {name: service_pb2.StatisticDuration(count=count, ns=ns) for name, ns in nanoseconds.items()}
    return service_pb2.ModelStatistics(
        inference_stats=service_pb2.InferStatistics(success=service_pb2.StatisticDuration(count=count), **durations)
    )


@pytest.fixture
def triton(monkeypatch):
    """Stands in for tritonclient: a test fills in what the server says about each model; others are unknown to it."""
    answers = types.SimpleNamespace(configs={}, statistics={})

    class Client:
        def __init__(self, url, channel_args):
            assert (url, channel_args) == ("host:8001", [])

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def get_model_config(self, model, client_timeout):
            return service_pb2.ModelConfigResponse(config=self._known(answers.configs, model))

        def get_inference_statistics(self, model, client_timeout):
            return service_pb2.ModelStatisticsResponse(model_stats=self._known(answers.statistics, model))

        def _known(self, known, model):
            if model not in known:
                raise InferenceServerException("unknown model", status="StatusCode.NOT_FOUND")
            return known[model]

    monkeypatch.setattr("serving.server.step_times.InferenceServerClient", Client)
    return answers


def test_the_mean_is_over_the_requests_between_two_readings():
    """By hand: 10 requests wait 30 ms together and are worked on for 120 ms, so 3 ms and 12 ms each."""
    before = {"ranker": StepTotal(requests=5, queue_ns=7_000_000, compute_ns=1_000_000)}
    after = {"ranker": StepTotal(requests=15, queue_ns=37_000_000, compute_ns=121_000_000)}
    assert mean_times(before, after) == {"ranker": StepTime(queue_ms=3.0, compute_ms=12.0)}


def test_a_step_that_was_not_asked_took_no_time():
    """No request is no division by zero: the given candidates of all requests may have needed no retrieval."""
    total = StepTotal(3, 100, 200)
    assert mean_times({"retriever": total}, {"retriever": total}) == {"retriever": StepTime(0.0, 0.0)}


def test_totals_add_versions_and_count_copies_as_work(triton):
    """By hand, two versions: 2 + 3 requests, 10 + 5 ns in the queue, and (1 + 20 + 300) + (4 + 50 + 600) ns of work;
    what failed, cache look-ups and the total are left out.
    """
    triton.statistics["ranker"] = [
        statistics(2, queue=10, compute_input=1, compute_infer=20, compute_output=300, cache_hit=7),
        statistics(3, queue=5, compute_input=4, compute_infer=50, compute_output=600, fail=9_000),
    ]
    triton.statistics["features"] = []
    totals = step_totals("host:8001", ["ranker", "features"])
    assert totals == {"ranker": StepTotal(5, 15, 975), "features": StepTotal(0, 0, 0)}


def test_an_ensemble_is_its_steps_in_order_and_any_other_model_itself(triton):
    """The order is that of the ensemble's configuration, not of the names."""
    scheduled = [{"model_name": f"{step}_r1"} for step in STEPS]
    triton.configs["llamarec_r1"] = model_config_pb2.ModelConfig(ensemble_scheduling={"step": scheduled})
    triton.configs["ranker"] = model_config_pb2.ModelConfig(name="ranker", backend="python")
    assert ensemble_steps("host:8001", "llamarec_r1") == [
        "features_r1",
        "retriever_r1",
        "prompt_builder_r1",
        "ranker_r1",
    ]
    assert ensemble_steps("host:8001", "ranker") == ["ranker"]


def test_a_model_that_is_not_served_is_an_error_of_the_client(triton):
    """Both questions translate gRPC's status as the client does: NOT_FOUND is a model that is not loaded."""
    with pytest.raises(ServerUnavailable, match="does not serve nothing"):
        ensemble_steps("host:8001", "nothing")
    with pytest.raises(ServerUnavailable, match="does not serve nothing"):
        step_totals("host:8001", ["nothing"])


def test_the_real_server_counts_three_requests_in_each_step(echo_server):
    """Three requests to the echoing ensemble: its own statistics know of three in every step, and of time in each."""
    steps = ensemble_steps(echo_server.url, "llamarec")
    assert steps == list(STEPS)
    before = step_totals(echo_server.url, steps)
    with RecommenderClient(echo_server.url) as client:
        for _ in range(3):
            client.recommend(["a", "b"])
    after = step_totals(echo_server.url, steps)
    assert [after[step].requests - before[step].requests for step in steps] == [3, 3, 3, 3]
    assert all(time.compute_ms > 0 and time.queue_ms >= 0 for time in mean_times(before, after).values())
