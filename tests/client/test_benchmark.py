"""perf_analyzer against a real server whose steps echo."""

import csv

import pytest

from client.benchmark import benchmark, input_data
from client.contract import RETRIEVAL_ENSEMBLE, STEPS
from client.errors import BenchmarkError, ServerUnavailable
from client.server import free_ports


def test_rows_table_and_plot(echo_server, tmp_path):
    """Histories of four lengths, one of them 0, at concurrency 1 and 2: figures that can be true, and written."""
    histories = [["a"] * length for length in (0, 1, 7, 40)]
    rows = benchmark(echo_server.url, histories, (1, 2), folder=tmp_path / "bench", requests=10)
    assert [row.concurrency for row in rows] == [1, 2]
    for row in rows:
        assert 0 < row.p50_ms <= row.p95_ms <= row.p99_ms
        # Little's law: what is in flight is throughput times mean latency, and the median lies below twice the mean.
        assert 0 < row.throughput < 2 * row.concurrency / (row.p50_ms / 1e3)
        assert tuple(row.steps) == STEPS
        assert all(time.compute_ms > 0 <= time.queue_ms for time in row.steps.values())
    with (tmp_path / "bench" / "benchmark.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["concurrency"] for row in written] == ["1", "2"]
    assert float(written[1]["ranker_compute_ms"]) == pytest.approx(rows[1].steps["ranker"].compute_ms, rel=1e-4)
    assert (tmp_path / "bench" / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_the_split_counts_the_requests_of_the_measurement_only(echo_server, tmp_path):
    """A step that sleeps for a second shows that second; earlier, fast requests to the same server don't dilute it."""
    (row,) = benchmark(echo_server.url, [["~"]], (1, 1), RETRIEVAL_ENSEMBLE, tmp_path, requests=1)
    assert tuple(row.steps) == STEPS[:2]
    assert 1000 < row.steps["retriever"].compute_ms < 1100
    assert row.throughput < 1


def test_input_data_keeps_each_length():
    """Values with their shape, without the batch dimension (perf_analyzer's documentation, "Input Data")."""
    assert input_data([["1", "2"], []]) == {
        "data": [{"HISTORY": {"content": ["1", "2"], "shape": [2]}}, {"HISTORY": {"content": [], "shape": [0]}}]
    }


def test_a_refused_request_says_why_and_writes_nothing(echo_server, tmp_path):
    """perf_analyzer's own complaint is in the error, the server's sentence among it."""
    with pytest.raises(BenchmarkError, match=r"(?s)measured nothing at concurrency 1.*HISTORY holds 'bad'"):
        benchmark(echo_server.url, [["bad"]], (1, 1), folder=tmp_path / "bench")
    assert not (tmp_path / "bench").exists()


def test_no_histories_and_no_server(tmp_path):
    """Each is one clear sentence before perf_analyzer starts."""
    with pytest.raises(BenchmarkError, match="no histories"):
        benchmark("127.0.0.1:1", [], folder=tmp_path)
    with pytest.raises(ServerUnavailable, match="llamarec serve"):
        benchmark(f"127.0.0.1:{free_ports(1)[0]}", [["a"]], folder=tmp_path)
