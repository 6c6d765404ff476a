"""A load that the client spreads over several servers."""

import json
import time

import pytest
from typer.testing import CliRunner

from llamarec.cli import app
from llamarec_client.errors import InvalidRequest, ServerUnavailable
from serving.contract import STEPS
from serving.errors import BenchmarkError
from serving.load_test import several_servers
from serving.load_test.several_servers import _Windows, benchmark
from serving.server.local import LocalServer
from serving.server.programs import free_ports
from serving.server.step_times import each_server, step_totals

HISTORIES = [["a"] * length for length in (0, 1, 7, 40)]


def test_figures_can_be_true(echo_server, monkeypatch):
    """Little's law: the requests in flight are throughput times mean latency, and the median is less than twice that.

    Three windows of at least 0.3 s take 0.9 s, and the steps are those of the ensemble.
    """
    monkeypatch.setattr(several_servers, "WINDOW_S", 0.3)
    began = time.monotonic()
    (row,) = benchmark([echo_server.url], HISTORIES, (2,), requests=10)
    assert time.monotonic() - began > 0.9
    assert 0 < row.p50_ms <= row.p90_ms <= row.p95_ms <= row.p99_ms
    assert 0 < row.throughput < 2 * row.load / (row.p50_ms / 1e3)
    assert tuple(row.steps) == STEPS
    assert all(times.compute_ms > 0 <= times.queue_ms for times in row.steps.values())
    assert 0 <= row.spread < float("inf")


def test_requests_at_a_rate(echo_server, monkeypatch):
    """In an open loop, 40 requests per second are sent without waiting for answers; throughput is close to 40."""
    monkeypatch.setattr(several_servers, "WINDOW_S", 0.1)
    (row,) = benchmark([echo_server.url], [["a"]], [40], mode="rate", requests=30)
    assert row.mode == "rate"
    assert 15 < row.throughput < 80


def test_a_window_needs_its_answers_and_its_time(monkeypatch):
    """Two answers are too few for a window of three, and three within no time complete one only if it may be short."""
    monkeypatch.setattr(several_servers, "WINDOW_S", 0.0)
    windows = _Windows(3)
    for _ in range(8):
        windows.add(0.5)
    assert [len(window.latencies) for window in windows.complete] == [3, 3]
    assert not windows.are_complete()
    windows.add(0.5)
    assert windows.are_complete()
    monkeypatch.setattr(several_servers, "WINDOW_S", 60.0)
    long = _Windows(1)
    long.add(0.5)
    assert not long.complete


def test_a_refused_request_and_an_absent_server_end_the_measurement(echo_server):
    """With the client's own error: within the warm-up, and without one within the measurement."""
    with pytest.raises(InvalidRequest, match="HISTORY holds 'bad'"):
        benchmark([echo_server.url], [["bad"]], [1], warm_up=0)
    absent = f"127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(ServerUnavailable, match=absent):
        benchmark([echo_server.url, absent], [["a"]], [1])
    with pytest.raises(BenchmarkError, match="no histories"):
        benchmark([echo_server.url], [])


def test_a_name_stands_for_its_addresses():
    """A name is resolved as the client resolves it; an address stays, and each server is counted once."""
    assert "127.0.0.1:8001" in each_server(["dns:///localhost:8001", "127.0.0.1:8001"])
    assert each_server(["10.0.0.1:8001", "10.0.0.1:8001"]) == ["10.0.0.1:8001"]
    with pytest.raises(BenchmarkError, match=r"dns:///nowhere\.invalid:8001 cannot be resolved"):
        each_server(["dns:///nowhere.invalid:8001"])


@pytest.mark.thorough
def test_the_command_spreads_over_two_servers(echo_server, echo_repository, artifacts, tmp_path, monkeypatch):
    """Both servers answer a good part of the requests, at least 20 in each of three windows together.

    The client prefers the server that answers sooner, which on a busy machine may be the same one for a while.

    The echoing steps take ids of one character, so every user has the history "a".
    """
    monkeypatch.setattr("preprocessing.data.Data.raw_history", lambda data, user: ["a"])
    with LocalServer(echo_repository) as second:
        urls = [echo_server.url, second.url]
        before = [step_totals(url, STEPS)["ranker"].requests for url in urls]
        options = ["--servers", ",".join(urls), "--concurrency", "4", "--artifacts", str(artifacts), "--json"]
        result = CliRunner().invoke(app, ["bench", *options, "--output", str(tmp_path)])
        answered = [step_totals(url, STEPS)["ranker"].requests - n for url, n in zip(urls, before, strict=True)]
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert row["load"] == 4
    assert min(answered) > 0.2 * sum(answered)
    assert sum(answered) >= 60
    assert f"client of {', '.join(urls)}" in (tmp_path / "report.html").read_text()
