"""perf_analyzer against a real server with echo steps."""

import csv
import re
import urllib.request

import pytest
from gateways import FakeClient, listening_gateway

from llamarec.gateway.keys import ApiKeys
from llamarec_client import AsyncRecommenderClient
from llamarec_client.address import PROXY_VARIABLES
from llamarec_client.contract import RETRIEVAL_ENSEMBLE
from llamarec_client.errors import InvalidRequest, ServerUnavailable
from serving.contract import STEPS
from serving.errors import BenchmarkError
from serving.load_test.perf_analyzer import benchmark, input_data, read_csv, spread, write_csv
from serving.server.programs import free_ports

PASSES = """
  Pass [1] throughput: 90 infer/sec. Avg latency: 1000 usec (std 3960 usec).
  Pass [2] throughput: 110 infer/sec. Avg latency: 1000 usec (std 2618 usec).
"""


@pytest.fixture(scope="module")
def rows(echo_server):
    """Measure histories of lengths 0, 1, 7 and 40 at concurrency 1 and 2."""
    histories = [["a"] * length for length in (0, 1, 7, 40)]
    return benchmark(echo_server.url, histories, (1, 2), requests=10)


@pytest.mark.thorough
def test_figures_can_be_true(rows):
    """The figures are consistent: percentiles increase, and throughput obeys Little's law.

    The requests in flight are throughput times mean latency, and the median is less than twice the mean.
    """
    assert [row.load for row in rows] == [1, 2]
    for row in rows:
        assert 0 < row.p50_ms <= row.p90_ms <= row.p95_ms <= row.p99_ms
        assert 0 < row.throughput < 2 * row.load / (row.p50_ms / 1e3)
        assert tuple(row.steps) == STEPS
        assert all(time.compute_ms > 0 <= time.queue_ms for time in row.steps.values())
        assert row.spread >= 0


@pytest.mark.thorough
def test_the_table_reads_back(rows, tmp_path):
    """The table is read back with a relative error of at most 1e-4; a table of another kind is refused."""
    write_csv(rows, tmp_path / "bench" / "benchmark.csv")
    with (tmp_path / "bench" / "benchmark.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["load"] for row in written] == ["1", "2"]
    for row, again in zip(rows, read_csv(tmp_path / "bench" / "benchmark.csv"), strict=True):
        assert again.p99_ms == pytest.approx(row.p99_ms, rel=1e-4)
        assert again.steps["ranker"] == pytest.approx(row.steps["ranker"], rel=1e-4)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(BenchmarkError, match="not a table of `llamarec bench`"):
        read_csv(tmp_path / "other.csv")


@pytest.mark.thorough
def test_a_gateway_gets_the_requests_instead(echo_server):
    """Its metrics count at least the measured requests, and the times of the steps are the server's. A gateway that
    refuses them ends the measurement.
    """
    with listening_gateway(lambda: AsyncRecommenderClient(echo_server.url)) as url:
        (row,) = benchmark(
            [echo_server.url], [["a"], ["a", "b"]], (2,), requests=10, gateway=url.removeprefix("http://")
        )
        with urllib.request.urlopen(f"{url}/metrics") as response:
            (counted,) = re.findall(r'requests_total.*recommend",status="200"} (\S+)', response.read().decode())
        assert float(counted) >= 30
        assert row.throughput > 0
        assert all(time.compute_ms > 0 for time in row.steps.values())
    with (
        listening_gateway(FakeClient(), ApiKeys(["0" * 64])) as url,
        pytest.raises(BenchmarkError, match="HTTP code 401"),
    ):
        benchmark(echo_server.url, [["a"]], (1,), requests=10, gateway=url.removeprefix("http://"))


@pytest.mark.thorough
def test_requests_at_a_rate(echo_server):
    """In an open loop, 20 requests per second are sent without waiting for answers; throughput is close to 20."""
    (row,) = benchmark(echo_server.url, [["a"]], [20], RETRIEVAL_ENSEMBLE, mode="rate", requests=20)
    assert row.mode == "rate"
    assert 8 < row.throughput < 40


@pytest.mark.thorough
def test_the_split_counts_the_requests_of_the_measurement_only(echo_server):
    """A step that sleeps for 1 s shows 1 s; earlier, faster requests to the same server do not lower the mean."""
    (row,) = benchmark(echo_server.url, [["~"]], [1], RETRIEVAL_ENSEMBLE, requests=1, warm_up=1)
    assert tuple(row.steps) == STEPS[:2]
    assert 1000 < row.steps["retriever"].compute_ms < 1100
    assert row.throughput < 1


def test_unstable_windows_are_seen():
    """Windows with throughput 90 and 110 differ by 20 % of their mean; the spread of one window is infinite."""
    assert spread(PASSES) == pytest.approx(0.2)
    assert spread("Pass [1] throughput: 90 infer/sec. Avg latency: 1000 usec") == float("inf")


def test_input_data_keeps_each_length():
    """Each history has its values and its shape without the batch dimension.

    The format is that of perf_analyzer's documentation, "Input Data".
    """
    assert input_data([["1", "2"], []]) == {
        "data": [{"HISTORY": {"content": ["1", "2"], "shape": [2]}}, {"HISTORY": {"content": [], "shape": [0]}}]
    }


def test_a_refused_request_says_why(echo_server):
    """The warm-up raises the client's error; without a warm-up, the error of perf_analyzer has the same message."""
    with pytest.raises(InvalidRequest, match="HISTORY holds 'bad'"):
        benchmark(echo_server.url, [["bad"]], [1])
    with pytest.raises(BenchmarkError, match=r"(?s)measured nothing at concurrency 1.*HISTORY holds 'bad'"):
        benchmark(echo_server.url, [["bad"]], [1], warm_up=0)


@pytest.mark.thorough
@pytest.mark.parametrize("variable", PROXY_VARIABLES)
def test_no_proxy_stands_between_perf_analyzer_and_this_machine(echo_server, monkeypatch, variable):
    """The gRPC of perf_analyzer asks a proxy for loopback addresses, too (grpc/grpc#29718); at this one, nothing
    listens.
    """
    monkeypatch.setenv(variable, f"http://127.0.0.1:{free_ports(1)[0]}")
    (row,) = benchmark(echo_server.url, [["a"]], loads=(1,), requests=1, warm_up=1)
    assert row.throughput > 0


def test_no_histories_and_no_server():
    """Missing histories and a missing server are reported in one sentence, before perf_analyzer starts."""
    with pytest.raises(BenchmarkError, match="no histories"):
        benchmark("127.0.0.1:1", [])
    with pytest.raises(ServerUnavailable, match="llamarec serve"):
        benchmark(f"127.0.0.1:{free_ports(1)[0]}", [["a"]])
