"""Who is admitted by the gateway, its limits, and what happens to requests whose caller hangs up or that it drains."""

import asyncio
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
from gateways import FAILURE, FakeClient, open_gateway
from scripted import serve

from llamarec.gateway.admission import Admission
from llamarec.gateway.app import create_app
from llamarec.gateway.keys import KEYS_VARIABLE, SHORTEST_KEY, ApiKeys, read_keys
from llamarec.gateway.options import GatewayOptions
from llamarec_client import AsyncRecommenderClient
from preprocessing.errors import InputError

KEY = "key-of-the-test-123"
GOOD = {"history": ["50"]}


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


# --- keys


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (f"Bearer {KEY}", 200),
        (f"bearer  {KEY}", 200),
        (None, 401),
        (KEY, 401),
        (f"Basic {KEY}", 401),
        (f"Bearer {KEY}x", 401),
        ("Bearer", 401),
        (f"Bearer {sha256(KEY)}", 401),
    ],
)
def test_a_key_is_needed(header, status):
    """What a caller sends is hashed, so the digest in the file is no key. Health and metrics need none."""
    client = FakeClient()
    with open_gateway(client, ApiKeys([sha256("another key of 1"), sha256(KEY)])) as http:
        answered = http.post("/v1/recommend", json=GOOD, headers={"Authorization": header} if header else {})
        assert answered.status_code == status
        if status == 401:
            assert set(answered.json()) == FAILURE
            assert answered.headers["WWW-Authenticate"] == "Bearer"
            assert not client.calls
        assert http.get("/health/live").status_code == 200
        assert http.get("/metrics").status_code == 200


def test_keys_come_from_file_and_environment(tmp_path):
    """The file has lines of `sha256sum`; the environment has the keys, and loses them."""
    environment = {KEYS_VARIABLE: f" {KEY}, second-key-of-test ", "OTHER": "x"}
    path = tmp_path / "keys"
    path.write_text(f"# shop\n{sha256('third-key-of-the-test')}  -\n\n{sha256('fourth').upper()} search\n")
    keys = read_keys(path, environment)
    assert environment == {"OTHER": "x"}
    accepted = (KEY, "second-key-of-test", "third-key-of-the-test", "fourth")
    assert all(keys.accepts(f"Bearer {key}".encode()) for key in accepted)
    assert not keys.accepts(b"Bearer fifth")
    assert not read_keys(None, {})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("secret-key\n", "line 1 of .* does not begin with a SHA-256"),
        ("# none\n", "has no keys"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_file_of_keys_is_named_without_its_content(tmp_path, text, said):
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=said) as raised:
        read_keys(path, {})
    assert "secret-key" not in str(raised.value)


def test_a_short_key_is_refused():
    with pytest.raises(InputError, match=f"fewer than {SHORTEST_KEY} characters") as raised:
        read_keys(None, {KEYS_VARIABLE: "short"})
    assert "short" not in str(raised.value)


# --- options


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "can be reached from other machines: give API keys"),
        (["--timeout", "0"], "--timeout 0 is out of range"),
        (["--timeout", "nan"], "--timeout nan is out of range"),
        (["--in-flight", "0"], "--in-flight 0 is out of range"),
        (["--port", "70000"], "--port 70000 is not a port"),
        (["--certificate", "nothing.pem"], "needs both --certificate and --private-key"),
        (["--servers", "no address"], "no address"),
        (["--server-ca", "nothing.pem"], "nothing.pem is not a file"),
        (["--api-keys", "nothing"], "nothing cannot be read"),
        (["--page", "--servers", "a:1,b:1"], "--page serves one server to this machine"),
        (["--page", "--artifacts", "nothing"], "nothing"),
    ],
)
def test_a_bad_option_is_refused_at_the_start(arguments, said, monkeypatch, capsys):
    """With exit code 2 and a sentence that names it."""
    from llamarec.cli import main

    monkeypatch.setattr(sys, "argv", ["llamarec", "gateway", *arguments])
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 2
    assert said in re.sub(r"\s+", " ", capsys.readouterr().err)


@pytest.mark.parametrize(("host", "loopback"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("::", False)])
def test_loopback_is_recognised(host, loopback):
    assert GatewayOptions(host=host).on_loopback == loopback


# --- limits


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_refused(chunked):
    """With and without a Content-Length; a body of exactly the limit passes."""
    client = FakeClient()
    body = json.dumps(GOOD).encode()
    with open_gateway(client, body_bytes=len(body)) as http:
        for content, status in ((body, 200), (body + b" ", 413)):
            sent = iter([content[:5], content[5:]]) if chunked else content
            answered = http.post("/v1/recommend", content=sent, headers={"Content-Type": "application/json"})
            assert answered.status_code == status
    assert set(answered.json()) == FAILURE
    assert len(client.calls) == 1


@pytest.mark.parametrize(
    "header", [{"X-Request-Timeout": x} for x in ("0", "nan", "-1", "inf", "soon")] + [{"X-Request-ID": "a b"}]
)
def test_a_bad_header_is_named(header):
    with open_gateway(FakeClient()) as http:
        answered = http.post("/v1/recommend", json=GOOD, headers=header)
    assert answered.status_code == 400
    assert answered.json()["detail"].startswith(next(iter(header)))


class Slow(FakeClient):
    """Answers once it is told to, and knows whether it was cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()
        self.began = asyncio.Event()
        self.cancelled = False

    async def _called(self, method, arguments) -> None:
        self.began.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise


class Caller:
    """One request, spoken as ASGI, whose caller can be slow or hang up."""

    def __init__(self, body: bytes = json.dumps(GOOD).encode()) -> None:
        self.messages: asyncio.Queue = asyncio.Queue()
        if body:
            self.messages.put_nowait({"type": "http.request", "body": body})
        self.sent: list[dict] = []

    async def ask(self, app: Admission, headers=()) -> None:
        headers = [(b"content-type", b"application/json"), *headers]
        scope = {"type": "http", "method": "POST", "path": "/v1/recommend", "headers": headers, "query_string": b""}
        await app({**scope, "state": {}}, self.messages.get, self._send)

    async def _send(self, message) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def headers(self) -> dict:
        return dict(self.sent[0]["headers"])


def app_of(client, **options) -> Admission:
    return create_app(GatewayOptions(**options), ApiKeys(), lambda: client)


def test_more_requests_than_the_limit_are_refused_at_once():
    """The first one is answered all the same, and then there is room again."""

    async def run() -> None:
        client = Slow()
        app = app_of(client, in_flight=1)
        first, second, third = Caller(), Caller(), Caller()
        task = asyncio.create_task(first.ask(app))
        await client.began.wait()
        await second.ask(app)
        assert (second.status, second.headers[b"retry-after"]) == (429, b"1")
        client.go.set()
        await task
        await third.ask(app)
        assert (first.status, third.status) == (200, 200)

    asyncio.run(run())


def test_a_caller_that_hangs_up_ends_its_request():
    """The call of the client is cancelled, which cancels the request in the server; nothing more is sent."""

    async def run() -> None:
        client, caller = Slow(), Caller()
        app = app_of(client)
        task = asyncio.create_task(caller.ask(app))
        await client.began.wait()
        caller.messages.put_nowait({"type": "http.disconnect"})
        await asyncio.wait_for(task, 5)
        assert client.cancelled
        assert not caller.sent

    asyncio.run(run())


def test_a_body_that_does_not_arrive_is_refused():
    """After the deadline; the connection is closed, because the rest of the body may still come."""

    async def run() -> None:
        caller = Caller(b"")
        await caller.ask(app_of(FakeClient()), [(b"x-request-timeout", b"0.05")])
        assert caller.status == 408
        assert caller.headers[b"connection"] == b"close"

    asyncio.run(run())


def test_a_draining_gateway_finishes_what_it_began():
    """A request in flight is answered; a further one is refused so that the caller retries elsewhere; not ready."""

    async def run() -> None:
        client, first, second = Slow(), Caller(), Caller()
        app = app_of(client)
        task = asyncio.create_task(first.ask(app))
        await client.began.wait()
        app.draining = True
        await second.ask(app)
        assert (second.status, second.headers[b"retry-after"]) == (503, b"1")
        assert second.headers[b"connection"] == b"close"
        client.go.set()
        await task
        assert first.status == 200

    asyncio.run(run())


def test_a_request_that_outlasts_the_drain_is_told():
    """The server cancels what is in flight when the time is over."""

    async def run() -> None:
        client, caller = Slow(), Caller()
        app = app_of(client)
        task = asyncio.create_task(caller.ask(app))
        await client.began.wait()
        app.draining = True
        task.cancel()
        await task
        assert client.cancelled
        assert caller.status == 503

    asyncio.run(run())


# --- with the real client


@pytest.fixture
def scripted():
    with serve() as (script, url):
        yield script, url


def test_the_id_of_a_request_reaches_the_server_and_the_metrics_its_end(scripted):
    """From X-Request-ID to the id of the gRPC request, which the steps log, and back."""
    script, url = scripted
    with open_gateway(lambda: AsyncRecommenderClient(url)) as http:
        answered = http.post("/v1/recommend", json={**GOOD, "fallback": "retriever"}, headers={"X-Request-ID": "r-1"})
        assert answered.json()["request_id"] == "r-1"
        assert script.ids == ["r-1"]
        http.post("/v1/recommend", content=b"{")
        http.post("/v2/elsewhere", content=b"{}")
        counted = http.get("/metrics").text
    for labels in ('"/v1/recommend",status="200"', '"/v1/recommend",status="400"', '"other",status="404"'):
        assert f"llamarec_gateway_requests_total{{endpoint={labels}}} 1.0" in counted
    assert "llamarec_gateway_in_flight 0.0" in counted
    assert 'llamarec_gateway_request_seconds_count{endpoint="/v1/recommend"} 2.0' in counted


def test_ready_means_that_a_server_answers(scripted):
    """A request to the retriever shows it. The answer is kept for a second, so that probes cannot load the servers."""
    script, url = scripted
    with open_gateway(lambda: AsyncRecommenderClient(url)) as http:
        assert [http.get("/health/ready").status_code for _ in range(5)] == [200] * 5
    assert script.asked == ["llamarec_retrieval"]
    with open_gateway(lambda: AsyncRecommenderClient("127.0.0.1:1")) as http:
        answered = http.get("/health/ready")
    assert answered.status_code == 503
    assert "127.0.0.1:1" in answered.text


def post(url: str, body: object) -> tuple[int, dict]:
    request = urllib.request.Request(
        f"{url}/v1/recommend", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@contextmanager
def running(servers: str, *arguments: str):
    """Yield process and address of a gateway in a process of its own."""
    command = [sys.executable, "-m", "llamarec.cli", "gateway", "--port", "0", "--servers", servers, *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, KEYS_VARIABLE: ""})
    try:
        line = process.stderr.readline()
        assert line.startswith("gateway: http"), line + process.stderr.read()
        yield process, line.split()[1]
    finally:
        process.kill()
        process.wait()


@pytest.mark.thorough
@pytest.mark.parametrize("drain", [20, 1])
def test_sigterm_drains_the_process(scripted, drain):
    """A request of 2 s that is in flight is answered, or refused after the time to drain; the exit code is 0."""
    script, url = scripted
    with running(url, "--drain-seconds", str(drain)) as (process, gateway):
        assert post(gateway, GOOD)[0] == 200
        script.says(llamarec=[2.0, None])
        answers = []
        thread = threading.Thread(target=lambda: answers.append(post(gateway, GOOD)))
        thread.start()
        while not script.asked:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        thread.join()
        assert answers[0][0] == (200 if drain == 20 else 503)
        assert process.wait(10) == 0
        with pytest.raises(urllib.error.URLError):
            post(gateway, GOOD)
