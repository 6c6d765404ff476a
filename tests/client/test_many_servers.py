"""One client of several servers, against gRPC servers with scripted answers: what each of them is asked."""

import asyncio
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from scripted import GOOD, Scripted, serve
from tritonclient.grpc import service_pb2

from llamarec_client import AsyncRecommenderClient, RecommenderClient, Request, Tls, releases, resolver
from llamarec_client.contract import ENSEMBLE
from llamarec_client.errors import ClientError, InvalidRequest, RequestTimeout, ServerUnavailable
from llamarec_client.retries import RETRY_BURST
from serving.server.programs import free_ports

UNAVAILABLE = (grpc.StatusCode.UNAVAILABLE, "starting")
FULL = (grpc.StatusCode.UNAVAILABLE, "in ensemble 'llamarec', prompt_builder: queue full: 8 wait for the ranker")
DEAD = (grpc.StatusCode.INTERNAL, "in ensemble 'llamarec', Stub process 'ranker_0_0' is not healthy.")
"""Statuses and messages as tritonserver 2.51 returns them."""
Sends = Callable[[list[Request], Any], list[Any]]


@pytest.fixture
def three() -> Iterator[tuple[list[Scripted], list[str]]]:
    """Three running servers, and their addresses."""
    with ExitStack() as open_:
        servers, urls = zip(*(open_.enter_context(serve()) for _ in range(3)), strict=True)
        for server in servers:
            server.says(llamarec=[GOOD], llamarec_retrieval=[GOOD])
        yield list(servers), list(urls)


@pytest.fixture(params=["plain", "asyncio"])
def send(request) -> Sends:
    """Return ``send(requests, urls, ...)``, which sends them with one client of either kind, one after another."""

    def plain(requests, urls, **options):
        with RecommenderClient(urls) as client:
            return client.recommend_many(requests, in_flight=1, **options)

    async def in_loop(requests, urls, **options):
        async with AsyncRecommenderClient(urls) as client:
            return await client.recommend_many(requests, in_flight=1, **options)

    return plain if request.param == "plain" else lambda *given, **options: asyncio.run(in_loop(*given, **options))


def answered(results: list[Any]) -> bool:
    return not any(isinstance(result, ClientError) for result in results)


def test_requests_are_spread_evenly(three, send):
    """30 requests over three idle servers: ten each."""
    servers, urls = three
    assert answered(send([Request(["a"])] * 30, urls))
    assert [len(server.asked) for server in servers] == [10] * 3


def test_a_slow_server_gets_fewer_requests(three):
    """With six requests in flight, a server that takes 0.4 s holds two of them, and the others answer the rest."""
    servers, urls = three
    servers[0].says(llamarec=[0.4])
    for server in servers[1:]:
        server.says(llamarec=[0.01])
    with RecommenderClient(urls) as client:
        assert answered(client.recommend_many([Request(["a"])] * 60, in_flight=6))
    assert len(servers[0].asked) <= 10 < min(len(server.asked) for server in servers[1:])


def test_a_retry_goes_to_another_server_at_once(three, send):
    """The one that refused is asked once in half a second, and no caller sees that; a retry in place would pause."""
    servers, urls = three
    servers[0].says(llamarec=[UNAVAILABLE])
    start = time.monotonic()
    assert answered(send([Request(["a"])] * 12, urls))
    if time.monotonic() - start < 0.5:
        assert len(servers[0].asked) == 1
    assert sum(len(server.asked) for server in servers[1:]) == 12


def test_a_dead_step_of_one_server_degrades_nobody(three, send):
    """Another server's ranker answers, before the fallback does."""
    servers, urls = three
    servers[0].says(llamarec=[DEAD], llamarec_retrieval=[GOOD])
    assert not any(answer.degraded for answer in send([Request(["a"])] * 6, urls, fallback="retriever"))


def test_another_servers_queue_comes_before_the_fallback(three, send):
    """A full queue is retried only where there is another server; where all are full, the retriever answers."""
    servers, urls = three
    servers[0].says(llamarec=[FULL], llamarec_retrieval=[GOOD])
    assert not any(answer.degraded for answer in send([Request(["a"])] * 6, urls, fallback="retriever"))
    for server in servers:
        server.says(llamarec=[FULL], llamarec_retrieval=[GOOD])
    assert all(answer.degraded for answer in send([Request(["a"])] * 6, urls, fallback="retriever"))


def test_the_retry_budget_holds_over_all_servers(three):
    """As for one server, 200 calls to three servers that refuse all of them add at most 10 % and the burst."""
    servers, urls = three
    for server in servers:
        server.says(llamarec=[UNAVAILABLE])
    with RecommenderClient(urls) as client:
        results = client.recommend_many([Request(["a"])] * 200)
    assert all(isinstance(result, ServerUnavailable) for result in results)
    assert 200 < sum(len(server.asked) for server in servers) <= 200 + 0.1 * 200 + RETRY_BURST


def test_a_server_that_does_not_answer_in_time_is_left_out(three, send):
    """Its own request ends with the deadline; the next five, within its pause, go to the other two."""
    servers, urls = three
    servers[0].says(llamarec=[1.0])
    results = send([Request(["a"])] * 8, urls, timeout=0.3)
    assert sum(isinstance(result, RequestTimeout) for result in results) == 1
    assert len(servers[0].asked) == 1


def test_a_server_comes_back(three):
    """After its pause of half a second, one request tries it; when that one is answered it gets its share again."""
    servers, urls = three
    servers[0].says(llamarec=[UNAVAILABLE, GOOD])
    with RecommenderClient(urls) as client:
        client.recommend_many([Request(["a"])] * 9, in_flight=1)
        time.sleep(0.6)
        servers[0].asked.clear()
        servers[0].says(llamarec=[GOOD])
        assert answered(client.recommend_many([Request(["a"])] * 9, in_flight=1))
    assert len(servers[0].asked) >= 3


def test_no_server_at_all_is_one_error_that_names_all(send):
    """Also where there are more servers than a call has attempts; the text ends with the cause and the remedy."""
    urls = [f"127.0.0.1:{port}" for port in free_ports(5)]
    (error,) = send([Request(["a"])], urls)
    assert type(error) is ServerUnavailable
    assert error.request_id
    assert all(url in str(error) for url in urls)
    assert "none of the servers" in str(error)
    assert "start one with `llamarec serve`" in str(error)


@pytest.mark.parametrize(
    "message",
    [
        "unexpected inference output 'RETRIEVER_RANK' for model 'llamarec'",
        "[request id: one] expected number of inputs between 2 and 4 but got 1 inputs for model 'llamarec'.",
        "[request id: one] inference input 'HISTORY' data-type is 'BYTES', but model 'llamarec' expects 'INT32'",
        "[request id: one] unexpected shape for input 'TOP_K' for model 'llamarec'. Expected [-1,1], got [1,2].",
    ],
)
def test_a_server_with_another_contract_is_refused(three, send, message):
    """Its tensors are not the client's: the other servers answer. Where all are so, the error says it."""
    servers, urls = three
    refusal = (grpc.StatusCode.INVALID_ARGUMENT, message)
    servers[0].says(llamarec=[refusal])
    assert answered(send([Request(["a"])] * 6, urls))
    for server in servers:
        server.says(llamarec=[refusal])
    (error,) = send([Request(["a"])], urls)
    assert isinstance(error, ServerUnavailable)
    assert "with another contract than this client's" in str(error)
    (error,) = send([Request(["a"])], urls[0])
    assert isinstance(error, InvalidRequest), "a single server behaves as before there were several"


def test_a_bad_request_visits_one_server(three, send):
    """It would be refused everywhere; and the server that refused it works, so it is not left out."""
    servers, urls = three
    for server in servers:
        server.says(llamarec=[(grpc.StatusCode.INVALID_ARGUMENT, "features: no \"unexpected inference input 'a'\"")])
    assert all(isinstance(result, InvalidRequest) for result in send([Request(["a"])] * 6, urls))
    assert [len(server.asked) for server in servers] == [2] * 3


@pytest.mark.parametrize("urls", [[], ["127.0.0.1:8001", "http://host:8001"], 3, {"127.0.0.1": 8001}, ["dns:///host"]])
def test_addresses_are_checked(urls):
    """Every address of a list, and what follows ``dns:///``, has a host and a port; an empty list has no server."""
    with pytest.raises(InvalidRequest, match=r"give host:port|has no port"):
        RecommenderClient(urls)


# --- names


@pytest.fixture
def hosts(monkeypatch) -> list[str]:
    """Return the addresses of ``recommender.test``, to be changed; an empty list is an unknown name."""
    found: list[str] = []

    def getaddrinfo(host: str, port: int, **options: Any) -> list[Any]:
        assert host == "recommender.test"
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found for _ in range(2)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return found


@pytest.fixture
def named() -> Iterator[tuple[dict[str, Scripted], str]]:
    """Three servers at different addresses of the loopback network with one port, by address, and their name."""
    (port,) = free_ports(1)
    with ExitStack() as open_:
        servers = {host: open_.enter_context(serve(host, port))[0] for host in ("127.0.0.1", "127.0.0.2", "127.0.0.3")}
        yield servers, f"dns:///recommender.test:{port}"


def test_a_name_stands_for_all_its_servers(hosts, named, send):
    """A channel of gRPC keeps to one of the name's addresses; this client sends each a third."""
    servers, url = named
    hosts += servers
    assert answered(send([Request(["a"])] * 30, url))
    assert [len(server.asked) for server in servers.values()] == [10] * 3


def test_an_unknown_name_is_told_apart_and_asked_for_again(hosts, named, send):
    """The error says that the name is the cause; once the name is known, the same client is answered."""
    servers, url = named
    (error,) = send([Request(["a"])], url)
    assert isinstance(error, ServerUnavailable)
    assert f"the host name of {url} cannot be resolved" in str(error)
    with RecommenderClient(url) as client:
        with pytest.raises(ServerUnavailable) as raised:
            client.recommend(["a"], request_id="r-1")
        assert raised.value.request_id == "r-1"
        hosts.append("127.0.0.2")
        assert len(client.recommend(["a"])) == 1
    assert len(servers["127.0.0.2"].asked) == 1


def test_new_addresses_join_and_gone_ones_drain(hosts, named, monkeypatch):
    """A request in flight at an address that goes is answered; then the address gets none, and its channel closes."""
    monkeypatch.setattr(resolver, "LOOK_UP_S", 0.05)
    servers, url = named
    hosts += ["127.0.0.1", "127.0.0.2"]
    servers["127.0.0.1"].says(llamarec=[0.5])
    servers["127.0.0.2"].says(llamarec=[GOOD])
    servers["127.0.0.3"].says(llamarec=[GOOD])

    async def in_loop() -> None:
        async with AsyncRecommenderClient(url) as client:
            slow = [asyncio.create_task(client.recommend(["a"])) for _ in range(2)]
            await asyncio.sleep(0.1)
            hosts[:] = ["127.0.0.2", "127.0.0.3"]
            await client.recommend(["a"])  # starts the look-up
            await asyncio.sleep(0.1)
            servers["127.0.0.1"].asked.clear()
            await client.recommend_many([Request(["a"])] * 10)
            assert all(len(answer) == 1 for answer in await asyncio.gather(*slow))
            await client.recommend(["a"])
            assert len(client._channels._open) == 2

    asyncio.run(in_loop())
    assert servers["127.0.0.1"].asked == []
    assert len(servers["127.0.0.3"].asked) >= 5


def test_a_server_that_fails_is_looked_up_again_soon(hosts, named, monkeypatch):
    """Its replacement has another address, which the periodic look-up would find half a minute later."""
    monkeypatch.setattr(resolver, "LOOK_UP_AFTER_FAILURE_S", 0.0)
    servers, url = named
    hosts += ["127.0.0.1", "127.0.0.2"]
    with RecommenderClient(url) as client:
        client.recommend_many([Request(["a"])] * 2, in_flight=1)
        servers["127.0.0.1"].says(llamarec=[UNAVAILABLE])
        hosts[:] = ["127.0.0.2", "127.0.0.3"]
        end = time.monotonic() + 5
        while not servers["127.0.0.3"].asked:
            assert time.monotonic() < end
            client.recommend(["a"])


def test_a_name_server_that_fails_later_changes_nothing(hosts, named, monkeypatch):
    """The addresses that were found last remain."""
    monkeypatch.setattr(resolver, "LOOK_UP_S", 0.0)
    _, url = named
    hosts.append("127.0.0.1")
    with RecommenderClient(url) as client:
        client.recommend(["a"])
        hosts.clear()
        assert answered(client.recommend_many([Request(["a"])] * 5, in_flight=1))


def test_a_slow_name_server_does_not_exceed_the_deadline(monkeypatch):
    """The time counts for a call that has to wait for the look-up, because no address is known yet."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **options: time.sleep(3) or [])
    start = time.monotonic()
    with RecommenderClient("dns:///recommender.test:8001") as client, pytest.raises(ServerUnavailable, match="in time"):
        client.recommend(["a"], timeout=0.3)
    assert time.monotonic() - start < 2


def test_a_certificate_is_checked_against_the_name(hosts, tmp_path):
    """The certificate has the name alone, and the connection goes to an address."""
    hosts.append("127.0.0.1")
    certificate, key = tmp_path / "server.pem", tmp_path / "server.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=test", "-addext", "subjectAltName=DNS:recommender.test"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    pair = (key.read_bytes(), certificate.read_bytes())
    with serve(credentials=grpc.ssl_server_credentials([pair])) as (_, url):
        port, tls = url.rpartition(":")[2], Tls(Path(certificate))
        with RecommenderClient(f"dns:///recommender.test:{port}", tls=tls) as client:
            assert len(client.recommend(["a"])) == 1
        with RecommenderClient(url, tls=tls) as client, pytest.raises(ServerUnavailable, match="Hostname"):
            client.recommend(["a"])


def test_a_closed_client_of_a_name_says_so(hosts):
    """It has no connection yet, and opens none."""
    hosts.append("127.0.0.1")
    client = RecommenderClient("dns:///recommender.test:8001")
    client.close()
    with pytest.raises(InvalidRequest, match="is closed: open a new one"):
        client.recommend(["a"])


def test_a_name_in_no_proxy_is_connected_to_directly(hosts, named, monkeypatch):
    """The environment lists the name, and not the addresses, of which gRPC alone would know."""
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_ports(1)[0]}")
    monkeypatch.setenv("no_proxy", ".test")
    servers, url = named
    hosts.append("127.0.0.2")
    with RecommenderClient(url) as client:
        assert len(client.recommend(["a"])) == 1
    assert servers["127.0.0.2"].asked == [ENSEMBLE]


# --- releases


def compared(urls: list[str], monkeypatch: pytest.MonkeyPatch, between: Callable[[], None] = lambda: None) -> int:
    """Return how many differences a client of these servers counted in its first comparison.

    ``between`` is called before a difference is looked at again.
    """
    ended = threading.Event()
    whole = releases.ReleaseComparison._compare

    def compare(self: releases.ReleaseComparison) -> None:
        whole(self)
        ended.set()

    monkeypatch.setattr(releases.ReleaseComparison, "_compare", compare)
    monkeypatch.setattr(releases, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: between()))
    with RecommenderClient(urls) as client:
        client.recommend(["a"])
        assert ended.wait(10) is (len(urls) > 1)
        return client.mixed_releases


def test_different_releases_are_counted_and_named(three, monkeypatch, caplog):
    servers, urls = three
    servers[1].release = "r2"
    assert compared(urls, monkeypatch) == 1
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "llamarec_client"]
    for server, url in zip(servers, urls, strict=True):
        assert f"{url}: {server.release}" in warning


@pytest.mark.parametrize("stopped", [False, True])
def test_servers_of_one_release_are_no_difference(three, monkeypatch, caplog, stopped):
    """Nor is a server that does not answer."""
    _, urls = three
    unused = [f"127.0.0.1:{free_ports(1)[0]}"] if stopped else []
    assert compared([*urls, *unused], monkeypatch) == 0
    assert not [record for record in caplog.records if record.name == "llamarec_client"]


def test_a_promotion_that_is_going_on_is_no_difference(three, monkeypatch):
    """The servers switch one after the other; a moment later all have the new release."""
    servers, urls = three
    servers[0].release = "r2"

    def switch() -> None:
        for server in servers:
            server.release = "r2"

    assert compared(urls, monkeypatch, switch) == 0


def test_an_export_without_releases_has_no_name():
    """The steps of a plain repository are called ``features`` and so on; those of the release r-2, ``features_r-2``."""
    for name, release in (("features", releases.NO_RELEASE), ("features_r-2", "r-2")):
        config = {"ensemble_scheduling": {"step": [{"model_name": name}]}}
        assert releases.served_release(service_pb2.ModelConfigResponse(config=config)) == release
