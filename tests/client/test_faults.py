"""The clients against a real server with real faults: a killed step, a full queue, TLS and a silent connection."""

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from llamarec_client.errors import Overloaded, ServerUnavailable, StepDied
from llamarec_client.recommender import AsyncRecommenderClient, RecommenderClient, Request, Tls
from serving.server.local import LocalServer


def step_process(server: LocalServer, step: str) -> int:
    """Return the process id of a step's stub, whose command line contains the name of the model instance."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == server.pid and any(word.startswith(f"{step}_0".encode()) for word in words):
            return int(path.name)
    raise AssertionError(f"no process of {step}")


def test_a_killed_ranker_is_named_and_the_retriever_answers_instead(echo_repository):
    """After SIGKILL, a plain call raises an error that names the step; one with a fallback gets a degraded answer."""
    with LocalServer(echo_repository) as server, RecommenderClient(server.url) as client:
        assert not client.recommend(["a", "b"], fallback="retriever").degraded
        os.kill(step_process(server, "ranker"), signal.SIGKILL)
        with pytest.raises(StepDied, match="step ranker is dead"):
            client.recommend(["a", "b"])
        answer = client.recommend(["a", "b"], fallback="retriever")
        assert answer.degraded
        assert list(answer) == client.recommend(["a", "b"], model="llamarec_retrieval")


@pytest.fixture(scope="module")
def narrow(echo_repository, tmp_path_factory) -> Iterator[LocalServer]:
    """Start a server whose ranker takes 0.5 s for each request and whose queue limits the wait to 1.2 s."""
    repository = tmp_path_factory.mktemp("narrow") / "repository"
    shutil.copytree(echo_repository, repository)
    config = repository / "ranker" / "config.pbtxt"
    config.write_text(re.sub(r'string_value: "[\d.]+"', 'string_value: "1.2"', config.read_text()))
    model = repository / "ranker" / "1" / "model.py"
    model.write_text(model.read_text().replace("cut = slice", "time.sleep(0.5)\n        cut = slice"))
    with LocalServer(repository) as server:
        yield server


def test_a_full_queue_refuses_some_and_degrades_them(narrow):
    """Ten concurrent requests exceed the queue: some are refused, but with a fallback all ten are answered."""

    async def ask(fallback):
        async with AsyncRecommenderClient(narrow.url) as client:
            return await client.recommend_many([Request(["a"])] * 10, fallback=fallback, timeout=20)

    degraded = asyncio.run(ask("retriever"))
    assert 0 < sum(answer.degraded for answer in degraded) < 10
    assert all([row.item_id for row in answer] == ["a"] for answer in degraded)
    refused = [answer for answer in asyncio.run(ask(None)) if isinstance(answer, Exception)]
    assert refused
    assert all(isinstance(error, Overloaded) for error in refused)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Path:
    """Create a certificate authority, and certificates for a server and a client that it signed."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test authority")
    for name in ("server", "client"):
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (folder / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names", "-out", f"{name}.pem")
        openssl("x509", "-req", "-in", f"{name}.csr", *signed)
    return folder


class EncryptedServer(LocalServer):
    """A server whose readiness is read from its log, because the plain-text probe cannot connect to it."""

    def _is_ready(self) -> bool:
        return "Started GRPCInferenceService" in self.log()


@pytest.mark.thorough
def test_mutual_tls(echo_repository, certificates):
    """The server answers a client whose certificate its authority signed; no certificate and plain text are refused."""
    files = {"cert": "server.pem", "key": "server.key"}
    flags = ["--grpc-use-ssl=1", "--grpc-use-ssl-mutual=1", f"--grpc-root-cert={certificates / 'ca.pem'}"]
    flags += [f"--grpc-server-{name}={certificates / file}" for name, file in files.items()]
    authority = certificates / "ca.pem"
    own = Tls(authority, certificates / "client.pem", certificates / "client.key")
    with EncryptedServer(echo_repository, arguments=flags) as server:
        with RecommenderClient(server.url, tls=own) as client:
            assert [row.item_id for row in client.recommend(["a", "b"])] == ["b", "a"]
        for tls in (None, Tls(authority)):
            with RecommenderClient(server.url, tls=tls) as client, pytest.raises(ServerUnavailable):
                client.recommend(["a"], timeout=5)

        async def ask():
            async with AsyncRecommenderClient(server.url, tls=own) as client:
                return await client.recommend(["a"])

        assert [row.item_id for row in asyncio.run(ask())] == ["a"]


class SilentProxy:
    """A proxy that stops forwarding once ``silent`` is set, like a peer that vanished without closing a connection."""

    def __init__(self, url: str) -> None:
        host, port = url.split(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.silent = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self.silent.is_set():
                continue  # held open, never answered
            far = socket.create_connection(self._target)
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):  # one side hung up
            while data := source.recv(65536):
                if self.silent.is_set():
                    time.sleep(60)
                sink.sendall(data)

    def close(self) -> None:
        self._listener.close()


@pytest.mark.thorough
def test_keep_alive_finds_a_silent_peer_long_before_the_deadline(echo_server):
    """With ``keep_alive=1`` a call fails about two seconds after the peer falls silent, not at its deadline of 60 s."""
    proxy = SilentProxy(echo_server.url)
    try:
        with RecommenderClient(proxy.url, keep_alive=1) as client:
            assert len(client.recommend(["a"])) == 1
            proxy.silent.set()
            start = time.monotonic()
            with pytest.raises(ServerUnavailable):
                client.recommend(["a"], timeout=60)
            assert time.monotonic() - start < 30
    finally:
        proxy.close()


@pytest.mark.thorough
def test_a_restarted_server_is_found_at_once(echo_repository):
    """A client that outlives a restart is answered over the same channel within 5 s of the new server's start."""
    with LocalServer(echo_repository) as first, RecommenderClient(first.url) as client:
        client.recommend(["a"])
        port = int(first.url.split(":")[1])
        first.__exit__(None, None, None)
        with pytest.raises(ServerUnavailable):
            client.recommend(["a"])
        with LocalServer(echo_repository, grpc_port=port):
            end = time.monotonic() + 5
            while True:
                try:
                    answer = client.recommend(["a"])
                    break
                except ServerUnavailable:
                    assert time.monotonic() < end, "the channel did not come back"
                    time.sleep(0.1)
            assert [row.item_id for row in answer] == ["a"]
