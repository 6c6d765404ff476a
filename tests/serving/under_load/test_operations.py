"""Metrics, log lines and traces for operators, and the metrics that the dashboard and the alerts use."""

import http.server
import json
import re
import shutil
import subprocess
import threading
import urllib.request
from pathlib import Path

import pytest
from supervised import inputs_of, serving, wait_for
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from llamarec_client.contract import DEGRADED, RETRIEVAL_ENSEMBLE
from serving.steps.telemetry import COUNTERS, HISTOGRAMS, RELEASE

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"


@pytest.fixture(scope="module")
def collector():
    """Receive OpenTelemetry's OTLP over HTTP as JSON, the form that Triton sends; yield port and messages."""
    received = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *words):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1], received
    server.shutdown()


@pytest.fixture(scope="module")
def served(repository, collector, tmp_path_factory):
    trace = ["mode=opentelemetry", "rate=1", "level=TIMESTAMPS"]
    trace.append(f"opentelemetry,url=http://127.0.0.1:{collector[0]}/v1/traces")
    flags = [f"--trace-config={setting}" for setting in trace]
    log = tmp_path_factory.mktemp("served") / "log"
    with serving(repository, log, *flags, environment={"LLAMAREC_REQUEST_LOG": "1"}) as running:
        with grpc.InferenceServerClient(running.url) as client:
            client.infer("llamarec", inputs_of(["50", "181", "nope"]), request_id="example-1")
            client.infer(RETRIEVAL_ENSEMBLE, inputs_of(["50"]), request_id="example-2", parameters={DEGRADED: "x"})
            with pytest.raises(InferenceServerException):
                client.infer("llamarec", inputs_of(["x" * 600]), request_id="example-3")
        yield running


@pytest.mark.parametrize(
    ("name", "labels", "value"),
    [
        ("llamarec_answers_total", {"step": "features"}, 2),
        ("llamarec_answers_total", {"step": "retriever"}, 2),
        ("llamarec_answers_total", {"step": "ranker"}, 1),
        ("llamarec_unknown_items_total", {"step": "features"}, 1),
        ("llamarec_errors_total", {"step": "features", "kind": "invalid"}, 1),
        ("llamarec_degraded_answers_total", {"reason": "other"}, 1),
        ("llamarec_candidates_sum", {}, 40),
        ("llamarec_prompt_tokens_count", {}, 1),
        ("llamarec_step_seconds_bucket", {"step": "ranker", "le": "+Inf"}, 1),
    ],
)
def test_metrics_count_what_was_asked(served, name, labels, value):
    """The values follow from the three requests of the fixture; the watch's probes are not counted.

    One request is ranked and has one unknown item, one is degraded, and one is refused.
    """
    assert wait_for(lambda: served.metric(name, **labels) == value, 10), served.metric(name, **labels)


def test_every_request_leaves_a_line_of_each_step(served):
    """Every step logs one line with the request's id; the line of a refused request gives the kind of error."""

    def lines(request):
        return [event for event in served.events() if event.get("request") == request]

    assert wait_for(lambda: len(lines("example-1")) == 4, 10)
    assert [line["step"] for line in lines("example-1")] == ["features", "retriever", "prompt_builder", "ranker"]
    (refused,) = lines("example-3")
    assert (refused["event"], refused["step"]) == ("invalid", "features")


def test_a_request_leaves_a_trace(served, collector):
    """A request, found by Triton's request id, leaves one trace with spans of the ensemble and of each step."""

    def spans():
        return [
            span
            for message in collector[1]
            for resource in message["resourceSpans"]
            for scope in resource["scopeSpans"]
            for span in scope["spans"]
        ]

    def attribute(span, key):
        return next(
            (item["value"].get("stringValue") for item in span.get("attributes", []) if item["key"] == key), None
        )

    def traced():
        found = [span["traceId"] for span in spans() if attribute(span, "triton.request_id") == "example-1"]
        mine = [span for span in spans() if span["traceId"] in found]
        return {attribute(span, "triton.model_name") for span in mine} - {None}

    assert wait_for(lambda: traced() >= {"llamarec", "features", "retriever", "prompt_builder", "ranker"}, 30), traced()


def expressions() -> list[str]:
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_dashboard_and_alerts_read_metrics_that_exist(served):
    """Every metric they use is on one of the two endpoints, or is declared by a step that has not used it yet."""
    told = ""
    for url in (f"http://{served.metrics_url}/metrics", f"http://{served.health_url}/metrics"):
        with urllib.request.urlopen(url, timeout=10) as response:
            told += response.read().decode()
    declared = {*COUNTERS, RELEASE, *(f"{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "sum", "count"))}
    alerts = [line for line in (DEPLOY / "alerts.yml").read_text().splitlines() if "expr:" in line]
    read = set(re.findall(r"\b(?:llamarec|nv)_\w+", "\n".join([*expressions(), *alerts])))
    assert len(read) > 10
    assert not [name for name in read if name not in declared and f"\n{name}" not in told]


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is in Debian's prometheus package")
@pytest.mark.parametrize(
    "words", ["check rules alerts.yml", "test rules alerts_test.yml", "check config prometheus.yml"]
)
def test_prometheus_accepts_rules_and_configuration(words):
    run = subprocess.run(["promtool", *words.split()], cwd=DEPLOY, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
