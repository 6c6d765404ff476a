"""The operator's calls as they go over the wire, to a server that speaks the few endpoints they use."""

import fcntl
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llamarec_client.contract import HISTORY
from serving.contract import PROBE, RELEASE_STEPS, STEP_SPECS, STORE_MODELS
from serving.errors import ServerFailure, ServerUnreachable
from serving.server.control import CONTROL_FILE, LOCK_FILE, Control, probe_request, repository_lock, step_of
from serving.server.programs import free_ports

KEY = "the operator's key"


@dataclass
class Asked:
    """One request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class Kserve:
    """A server on a real port that records what it is asked and answers what a test has put into ``answers``."""

    asked: list[Asked] = field(default_factory=list)
    answers: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    """Status and content for a path; 200 without content for any other."""
    silent: set[str] = field(default_factory=set)
    """Paths that get no answer until the test ends."""
    broken: set[str] = field(default_factory=set)
    """Paths at which the connection is closed within the answer."""
    ended: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def says(self, path: str, content: Any, status: int = 200) -> None:
        self.answers[path] = status, content if isinstance(content, bytes) else json.dumps(content).encode()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        kserve = self.server.kserve
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length)) if length else None
        kserve.asked.append(Asked(self.command, self.path, dict(self.headers), body))
        if self.path in kserve.silent:
            kserve.ended.wait(10)
            return
        status, content = kserve.answers.get(self.path, (200, b""))
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) + (self.path in kserve.broken)))
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture
def kserve() -> Iterator[Kserve]:
    kserve = Kserve()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.kserve, server.daemon_threads = kserve, True
        kserve.url = f"127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield kserve
        kserve.ended.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def control(kserve: Kserve) -> Control:
    return Control(kserve.url, KEY)


# --- what is asked


def test_every_call_carries_the_key_and_keeps_no_connection_open(control, kserve):
    """Triton compares the header that its flag ``--http-restricted-api=...:llamarec-key=...`` names; an open
    connection would delay the server's exit.
    """
    kserve.says("/v2/repository/index", [])
    control.is_ready()
    control.ready_models()
    control.load("features")
    control.unload("features")
    assert len(kserve.asked) == 4
    assert {asked.headers["llamarec-key"] for asked in kserve.asked} == {KEY}
    assert {asked.headers["Connection"] for asked in kserve.asked} == {"close"}


def test_loading_and_unloading_are_asked_for_by_name(control, kserve):
    """Triton's model repository extension: a POST to ``v2/repository/models/NAME/load`` and ``/unload``; without a
    parameter the body is an empty object.
    """
    control.load("ranker_r1")
    control.unload("ranker_r1")
    assert [(asked.method, asked.path, asked.body) for asked in kserve.asked] == [
        ("POST", "/v2/repository/models/ranker_r1/load", {}),
        ("POST", "/v2/repository/models/ranker_r1/unload", {}),
    ]


def test_a_configuration_override_is_sent_as_text(control, kserve):
    """Triton's model repository extension: the load parameter ``config`` is a string that holds the JSON of a model
    configuration, not the object itself.
    """
    config = {"name": "ranker", "parameters": {"REVIVE": {"string_value": "1"}}}
    control.load("ranker", config)
    (asked,) = kserve.asked
    assert list(asked.body) == ["parameters"]
    assert list(asked.body["parameters"]) == ["config"]
    assert json.loads(asked.body["parameters"]["config"]) == config


def test_an_inference_request_goes_out_unchanged(control, kserve):
    """The JSON of KServe's protocol is the caller's; the answer comes back as it is."""
    answer = {"model_name": "llamarec", "outputs": [{"name": "ITEM_ID", "data": ["50"]}]}
    kserve.says("/v2/models/llamarec/infer", answer)
    request = {"id": "1", "inputs": [{"name": "HISTORY", "shape": [1, 1], "datatype": "BYTES", "data": ["ünknown"]}]}
    assert control.infer("llamarec", request) == answer
    assert [(asked.method, asked.body) for asked in kserve.asked] == [("POST", request)]


@pytest.mark.parametrize(
    ("model", "path"), [(None, "/v2/health/ready"), ("ranker", "/v2/models/ranker/ready")], ids=["server", "model"]
)
def test_readiness_is_status_200_at_the_protocols_path(control, kserve, model, path):
    """KServe's protocol: 200 says ready, any other status not ready."""
    assert control.is_ready(model)
    kserve.says(path, b"", status=400)
    assert not control.is_ready(model)
    assert [(asked.method, asked.path) for asked in kserve.asked] == [("GET", path)] * 2


def test_the_loaded_models_are_those_of_the_index(control, kserve):
    """Triton's model repository extension: ``state`` may be left out of a row of ready models, and a model that did
    not load is listed with its reason.
    """
    rows = [
        {"name": "features", "version": "1", "state": "READY"},
        {"name": "retriever", "version": "1"},
        {"name": "ranker", "version": "1", "state": "UNAVAILABLE", "reason": "unloaded"},
    ]
    kserve.says("/v2/repository/index", rows)
    assert control.ready_models() == {"features", "retriever"}
    assert [(asked.method, asked.body) for asked in kserve.asked] == [("POST", {"ready": True})]


def test_answered_and_refused_requests_count_alike(control, kserve):
    """Statistics of two versions, added by hand: 3 + 1 + 20 + 0 = 24; a 64-bit count may arrive as a string, as
    protobuf's JSON has it.
    """
    counts = [
        {"success": {"count": 3}, "fail": {"count": 1}},
        {"success": {"count": "20"}, "fail": {"count": "0"}},
    ]
    stats = [
        {"version": str(version), "inference_stats": {**count, "queue": {"count": 99}}}
        for version, count in enumerate(counts, start=1)
    ]
    kserve.says("/v2/models/ranker/stats", {"model_stats": stats})
    assert control.answers("ranker") == 24


def test_a_configuration_is_read_as_it_is(control, kserve):
    config = {"name": "features", "instance_group": [{"count": 2}]}
    kserve.says("/v2/models/features/config", config)
    assert control.config("features") == config


# --- what can go wrong


def test_a_refusal_is_told_in_the_servers_own_words(control, kserve):
    """Triton answers an error with ``{"error": "<message>"}``."""
    kserve.says("/v2/repository/models/ranker/load", {"error": "failed to load 'ranker', no such file"}, status=400)
    with pytest.raises(ServerFailure) as refused:
        control.load("ranker")
    assert str(refused.value) == "failed to load 'ranker', no such file"


@pytest.mark.parametrize("content", [b"<html>It works!</html>", b"\xff", b'{"model_stats": '])
def test_an_answer_that_is_no_json_is_an_error(control, kserve, content):
    """Status 200 of another service on the port: it was a JSONDecodeError, which nothing caught."""
    kserve.says("/v2/models/ranker/config", content)
    with pytest.raises(ServerFailure, match=r"/v2/models/ranker/config answers b.* not JSON.* HTTP port"):
        control.config("ranker")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"<h1>Bad gateway</h1>", "<h1>Bad gateway</h1>"),
        (b'{"detail": "not here"}', '{"detail": "not here"}'),
        (b'["error"]', '["error"]'),
        (b"", "status 502"),
        (b"\xff", "\N{REPLACEMENT CHARACTER}"),
    ],
    ids=["no JSON", "no error in it", "no object", "empty", "no text"],
)
def test_an_error_of_another_form_is_told_as_it_came(control, kserve, content, told):
    """A proxy in front answers in its own way: whatever it says is better than a traceback."""
    kserve.says("/v2/models/ranker/config", content, status=502)
    with pytest.raises(ServerFailure) as refused:
        control.config("ranker")
    assert str(refused.value) == told


def test_a_silent_server_is_given_up_in_time(control, kserve):
    """The timeout that was asked for, here 50 ms, and an error that names address and path."""
    kserve.silent.add("/v2/models/ranker/infer")
    with pytest.raises(ServerUnreachable, match=f"{kserve.url}/v2/models/ranker/infer does not answer: timed out"):
        control.infer("ranker", {}, timeout=0.05)


def test_an_answer_that_breaks_off_is_no_answer(control, kserve):
    """A server that dies while it answers: one byte of the announced length never comes."""
    kserve.says("/v2/models/ranker/config", {"name": "ranker"})
    kserve.broken.add("/v2/models/ranker/config")
    with pytest.raises(ServerUnreachable, match="does not answer"):
        control.config("ranker")


def test_a_closed_port_is_unreachable_and_not_ready():
    """Before the server listens, and after it ended."""
    control = Control(f"127.0.0.1:{free_ports(1)[0]}", KEY)
    assert not control.is_ready()
    assert not control.is_ready("ranker")
    with pytest.raises(ServerUnreachable, match=r"does not answer: .*refused"):
        control.ready_models()


# --- address and key


def test_address_and_key_are_left_for_this_user_only(tmp_path):
    """Mode 0600 whatever the umask and whatever was there before, and no other file is left."""
    (tmp_path / CONTROL_FILE).write_text("{}")
    (tmp_path / CONTROL_FILE).chmod(0o644)
    control, umask = Control("127.0.0.1:8000", KEY), os.umask(0)
    try:
        control.write(tmp_path)
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / CONTROL_FILE).stat().st_mode) == 0o600
    assert Control.read(tmp_path) == control
    assert [path.name for path in tmp_path.iterdir()] == [CONTROL_FILE]


def test_where_no_server_runs_the_command_that_starts_one_is_named(tmp_path):
    with pytest.raises(ServerUnreachable, match=f"`llamarec serve --repository {tmp_path}`"):
        Control.read(tmp_path)


# --- names and probes


@pytest.mark.parametrize(
    ("model", "step"),
    [
        ("features", "features"),
        ("prompt_builder_r3", "prompt_builder"),
        ("ranker_2.0-rc1", "ranker"),
        ("llamarec", None),
        ("llamarec_retrieval_r3", None),
        ("events", "events"),
        ("events_r3", None),
        ("items", "items"),
        ("items_r3", None),
        ("rankers", None),
        ("neighbours", "neighbours"),
        ("neighbours_r3", "neighbours"),
        ("similar", None),
        ("similar_r3", None),
        ("retriever_scores", None),
        ("retriever_scores_r3", None),
    ],
)
def test_a_models_name_tells_its_step(model, step):
    """``<step>`` and ``<step>_<release>`` are steps; ensembles and the model with the retriever's graph are none."""
    assert step_of(model) == step


@pytest.mark.parametrize("step", [*RELEASE_STEPS, *STORE_MODELS])
def test_a_probe_is_a_complete_request_of_its_step(step):
    """KServe's protocol: every required input is there, and ``data`` holds as many elements as ``shape`` says."""
    request = probe_request(step)
    required = {spec.name for spec in STEP_SPECS[step].inputs if not spec.optional or spec == HISTORY}
    assert {tensor["name"] for tensor in request["inputs"]} == required
    assert request["id"] == PROBE
    for tensor in request["inputs"]:
        assert tensor["datatype"] in {"BYTES", "INT32", "INT64", "FP32"}
        assert tensor["shape"] == [1, len(tensor["data"])]


def test_a_probe_of_the_first_step_is_an_empty_history():
    """Written by hand: ``features`` needs HISTORY or a user, and the store may be down while the step is healthy."""
    history = {"name": "HISTORY", "shape": [1, 0], "datatype": "BYTES", "data": []}
    assert probe_request("features") == {"id": "llamarec-probe", "inputs": [history]}


# --- the lock


def obtainable(repository: Path, how: int) -> bool:
    """Whether the kernel gives another holder the lock at once."""
    descriptor = os.open(repository / LOCK_FILE, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def test_healing_shares_the_lock_and_a_flip_has_it_alone(tmp_path):
    """Two steps may be healed at once, and none while the aliases change; flock(2) is the judge."""
    with repository_lock(tmp_path, exclusive=False):
        assert obtainable(tmp_path, fcntl.LOCK_SH)
        assert not obtainable(tmp_path, fcntl.LOCK_EX)
    with repository_lock(tmp_path, exclusive=True):
        assert not obtainable(tmp_path, fcntl.LOCK_SH)
        assert not obtainable(tmp_path, fcntl.LOCK_EX)
    assert obtainable(tmp_path, fcntl.LOCK_EX)


def test_an_error_inside_frees_the_lock(tmp_path):
    with pytest.raises(ServerFailure), repository_lock(tmp_path, exclusive=True):
        raise ServerFailure("the flip was taken back")
    assert obtainable(tmp_path, fcntl.LOCK_EX)


def test_the_lock_holds_between_processes(tmp_path):
    """`llamarec release` and `llamarec serve` are two: the one waits until the other has left, or was killed."""
    program = (
        "import sys; from pathlib import Path; from serving.server.control import repository_lock\n"
        "with repository_lock(Path(sys.argv[1]), exclusive=True):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert not obtainable(tmp_path, fcntl.LOCK_SH)
        entered = threading.Event()

        def heal() -> None:
            with repository_lock(tmp_path, exclusive=False):
                entered.set()

        thread = threading.Thread(target=heal)
        thread.start()
        assert not entered.wait(0.05)
        other.kill()
        assert entered.wait(10)
        thread.join()


def test_a_repository_that_cannot_be_written_needs_no_lock(tmp_path):
    """A folder that is not there stands for one on a read-only volume: the block is entered all the same."""
    with repository_lock(tmp_path / "absent", exclusive=True):
        entered = True
    assert entered
    assert not (tmp_path / "absent").exists()
