"""The endpoint for orchestrators, asked over HTTP on a real port."""

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from serving.errors import ServerFailure
from serving.server.health import HealthEndpoint, health_metrics

STEPS = {
    "features": {"alive": True, "healing": False, "revived": 0, "reason": ""},
    "ranker_r1": {"alive": False, "healing": True, "revived": 2, "reason": "process 7 of instance ranker_0_0 died"},
}
METRICS = """\
# TYPE llamarec_ready gauge
llamarec_ready 0
# TYPE llamarec_step_up gauge
llamarec_step_up{model="features"} 1
llamarec_step_up{model="ranker_r1"} 0
# TYPE llamarec_step_revived_total counter
llamarec_step_revived_total{model="features"} 0
llamarec_step_revived_total{model="ranker_r1"} 2
"""


def ask(port: int, path: str) -> tuple[int, str, str]:
    """Status, content type and text."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
            return response.status, response.headers["Content-Type"], response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Type"], error.read().decode()


@pytest.fixture(scope="module")
def health() -> dict[str, Any]:
    """What the endpoint is told."""
    return {"ready": False, "steps": STEPS}


@pytest.fixture(scope="module")
def endpoint(health) -> Iterator[HealthEndpoint]:
    endpoint = HealthEndpoint(0, lambda: health)
    yield endpoint
    endpoint.close()


@pytest.mark.parametrize(("ready", "status"), [(True, 200), (False, 503)])
def test_readiness_is_a_status_and_says_why(endpoint, health, monkeypatch, ready, status):
    """Kubernetes takes 200 to 399 for ready; the text tells an operator which step it is."""
    monkeypatch.setitem(health, "ready", ready)
    answered, kind, text = ask(endpoint.port, "/ready")
    assert (answered, kind) == (status, "application/json")
    assert json.loads(text) == {"ready": ready, "steps": STEPS}


def test_a_dead_step_calls_for_no_restart(endpoint):
    """The supervisor heals steps itself: ``/live`` answers 200 as long as it can answer at all."""
    assert ask(endpoint.port, "/live") == (200, "text/plain", "alive\n")


def test_the_metrics_are_prometheus_text(endpoint):
    """Written by hand after Prometheus' text format 0.0.4, which the content type announces."""
    assert ask(endpoint.port, "/metrics") == (200, "text/plain; version=0.0.4", METRICS)


def test_before_any_step_is_known_the_metrics_are_complete():
    """A server that is starting has no steps yet: the types are declared, without a sample."""
    text = health_metrics({"ready": False, "steps": {}})
    assert [line for line in text.splitlines() if not line.startswith("#")] == ["llamarec_ready 0"]


def test_any_other_path_names_those_that_are_there(endpoint):
    status, _, text = ask(endpoint.port, "/")
    assert status == 404
    assert text == "/live, /ready or /metrics\n"


def test_one_slow_request_does_not_hold_up_another():
    """Two requests are under way at once: each waits until the other has come, and neither gives up."""
    both = threading.Barrier(2, timeout=5)

    def health() -> dict[str, Any]:
        both.wait()
        return {"ready": True, "steps": {}}

    endpoint, answered = HealthEndpoint(0, health), []
    threads = [threading.Thread(target=lambda: answered.append(ask(endpoint.port, "/ready")[0])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    endpoint.close()
    assert answered == [200, 200]


def test_a_closed_endpoint_leaves_its_port(endpoint, health):
    """A second supervisor can listen on it at once."""
    other = HealthEndpoint(0, lambda: health)
    port = other.port
    assert port != endpoint.port
    other.close()
    with socket.socket() as listener:
        assert listener.connect_ex(("127.0.0.1", port)) != 0
    with socket.create_server(("", port)) as listener:
        assert listener.getsockname()[1] == port


def test_closing_does_not_wait():
    """The standard library looks for a shutdown twice a second, so six endpoints took three seconds to close, each of
    them part of the time that an orchestrator waits for the server to end.
    """
    endpoints = [HealthEndpoint(0, dict) for _ in range(6)]
    started = time.monotonic()
    for endpoint in endpoints:
        endpoint.close()
    assert time.monotonic() - started < 1.5


def test_a_taken_port_is_one_sentence_that_names_the_flag(endpoint):
    with pytest.raises(ServerFailure, match=rf"--health-port {endpoint.port} cannot be used: .*in use"):
        HealthEndpoint(endpoint.port, dict)


def test_a_port_beyond_what_tcp_has_is_refused_alike():
    """TCP has 16 bits for a port, so the last one is 65535."""
    with pytest.raises(ServerFailure, match="--health-port 65536 cannot be used"):
        HealthEndpoint(65536, dict)
