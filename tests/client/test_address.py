"""Addresses and proxies: which address is refused with which sentence, and when gRPC connects through a proxy."""

import asyncio
import itertools
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scripted import serve

from llamarec_client import AsyncRecommenderClient, RecommenderClient, Tls
from llamarec_client.address import PROXY_VARIABLES, channel_options, check_address, proxy_variable
from llamarec_client.errors import InvalidRequest, RequestTimeout, ServerUnavailable
from serving.server.programs import free_ports
from serving.server.step_times import ensemble_steps


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch) -> None:
    for name in (*PROXY_VARIABLES, "no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serve() as (_, url):
        yield url


@pytest.fixture
def dead() -> str:
    """An address at which nothing listens."""
    return f"127.0.0.1:{free_ports(1)[0]}"


# --- what is an address


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:8001",
        "localhost:1",
        "recommender.example:65535",
        "triton_server:8001",
        "[::1]:8001",
        "[fe80::1%eth0]:8001",
        "dns:///recommender.example:8001",
        "unix:/run/triton.sock",
    ],
)
def test_an_address_is_a_host_and_a_port(address):
    """IPv6 stands in brackets; targets in gRPC's own notation are left to gRPC."""
    assert check_address(address) == address


@pytest.mark.parametrize(
    ("address", "named"),
    [
        ("http://host:8001", "begins with a scheme: leave http:// out and give host:port"),
        ("grpc://host:8001", "begins with a scheme: leave grpc:// out"),
        ("https://host", r"leave https:// out .* tls=Tls\(\) for an encrypted connection"),
        ("host", "'host' has no port: add the port of the gRPC endpoint, by default :8001"),
        ("[::1]", "has no port"),
        ("::1", r"IPv6 address without brackets: write it as in \[::1\]:8001"),
        ("::1:8001", "without brackets"),
        ("host:8001/v2", "has a path: give host:port"),
        (":8001", "has no host"),
        ("[]:8001", "has no host"),
        ("host:http", "has the port 'http': a port is a number from 1 to 65535"),
        ("host:99999", "has the port '99999'"),
        ("host:0", "has the port '0'"),
        ("", "is not one: give host:port, as in 127.0.0.1:8001"),
        ("a host:8001", "is not one"),
        (None, "None is not one"),
        (b"host:8001", "is not one"),
    ],
)
def test_what_is_wrong_with_an_address_is_said(address, named):
    """All of these were "no server answers: start one with `llamarec serve`"; a scheme in front of the host is what
    callers of tritonclient write (triton-inference-server/server#5543). Both clients refuse it when they are opened.
    """
    with pytest.raises(InvalidRequest, match=named):
        RecommenderClient(address)

    async def in_loop() -> None:
        AsyncRecommenderClient(address)

    with pytest.raises(InvalidRequest, match=named):
        asyncio.run(in_loop())


@given(st.text(max_size=20) | st.from_regex(r"[a-z\[:\]/.0-9]{0,12}", fullmatch=True))
@example("1" * 5000)
def test_any_text_is_an_address_or_refused(text):
    """No other error comes from the check, and what it accepts is returned unchanged."""
    with suppress(InvalidRequest):
        assert check_address(text) == text


def test_ipv6_is_connected_to(url):
    """The scripted server listens on IPv4, so that ``[::1]`` with its port is refused, by IPv6's loopback."""
    port = url.rpartition(":")[2]
    with (
        RecommenderClient(f"[::1]:{port}") as client,
        pytest.raises(ServerUnavailable, match=r"no server answers at \[::1\]:\d+: start one .*ipv6"),
    ):
        client.recommend(["a"])


# --- what listens there


def test_the_http_and_the_metrics_port_are_told_apart_from_no_server(echo_server, dead):
    """Triton closes the connection of a gRPC client on both; that was "start one with `llamarec serve`", as it still
    is where nothing listens.
    """
    for port in (echo_server.http_url, echo_server.metrics_url):
        with RecommenderClient(port) as client, pytest.raises(ServerUnavailable, match="give the gRPC port") as raised:
            client.recommend(["a"])
        assert "does not speak plain gRPC" in str(raised.value)
        assert "llamarec serve" not in str(raised.value)
    with RecommenderClient(dead) as client, pytest.raises(ServerUnavailable, match="start one with `llamarec serve`"):
        client.recommend(["a"])


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n"])
def test_another_protocol_is_told_apart(answer):
    """A web server in front of the recommender answers in HTTP/1.1 (wilhelm-lab/oktoberfest#76)."""
    listener = socket.create_server(("127.0.0.1", 0))

    def reply() -> None:
        held = []
        for _ in itertools.count():
            try:
                held.append(listener.accept()[0])
                held[-1].sendall(answer)
            except OSError:
                return

    threading.Thread(target=reply, daemon=True).start()
    port = listener.getsockname()[1]
    with RecommenderClient(f"127.0.0.1:{port}") as client, pytest.raises(ServerUnavailable, match="plain gRPC"):
        client.recommend(["a"])
    listener.close()


def test_a_server_without_tls_is_told_apart(url):
    """The handshake fails, and the message says that ``tls`` may be the mistake."""
    with (
        RecommenderClient(url, tls=Tls()) as client,
        pytest.raises(ServerUnavailable, match=r"TLS handshake with .* failed: .* or leave tls out"),
    ):
        client.recommend(["a"])


def test_an_unknown_host_is_told_apart():
    """Names below ``.invalid`` never resolve (RFC 6761)."""
    with (
        RecommenderClient("recommender.invalid:8001") as client,
        pytest.raises(ServerUnavailable, match=r"host name of recommender\.invalid:8001 cannot be resolved"),
    ):
        client.recommend(["a"], timeout=10)


# --- proxies


@pytest.mark.parametrize("variable", PROXY_VARIABLES)
def test_no_proxy_is_used_for_this_machine(url, dead, monkeypatch, variable):
    """By default gRPC asks the proxy of ``http_proxy`` for loopback addresses, too (grpc/grpc#29718, grpc/grpc#15942),
    which ended in "no server answers". Here nothing listens at the proxy's address, and the call is answered.
    """
    monkeypatch.setenv(variable, f"http://{dead}")
    port = url.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost"):
        with RecommenderClient(f"{host}:{port}") as client:
            assert [row.item_id for row in client.recommend(["a"])] == ["a"]

    async def in_loop() -> list[str]:
        async with AsyncRecommenderClient(url) as client:
            return [row.item_id for row in await client.recommend(["a"])]

    assert asyncio.run(in_loop()) == ["a"]


@pytest.mark.parametrize("variable", PROXY_VARIABLES)
def test_the_error_names_the_proxys_variable(dead, monkeypatch, variable):
    """For another machine gRPC uses the proxy, at whose address nothing listens: the remedy is in the environment."""
    monkeypatch.setenv(variable, f"http://user:secret@{dead}")
    with (
        RecommenderClient("recommender.example:8001") as client,
        pytest.raises(
            ServerUnavailable, match=f"through the proxy of {variable}: unset {variable}, or .* no_proxy"
        ) as e,
    ):
        client.recommend(["a"], timeout=10)
    assert "secret" not in str(e.value)
    with pytest.raises(ServerUnavailable, match=f"through the proxy of {variable}"):
        ensemble_steps("recommender.example:8001", "llamarec")


def test_a_silent_proxy_is_named_when_the_deadline_passes(monkeypatch):
    """The proxy accepts connections and answers nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with (
            RecommenderClient("recommender.example:8001") as client,
            pytest.raises(RequestTimeout, match="through the proxy of http_proxy within"),
        ):
            client.recommend(["a"], timeout=0.5)


@pytest.mark.parametrize(
    ("excluded", "address", "direct"),
    [
        ("", "recommender.example:8001", False),
        ("example", "recommender.example:8001", True),
        (".example", "recommender.example:8001", True),
        ("der.example", "recommender.example:8001", False),
        ("other, Recommender.Example", "recommender.example:8001", True),
        ("*", "recommender.example:8001", True),
        ("10.0.0.0/8", "10.1.2.3:8001", True),
        ("10.1.2.3", "10.1.2.3:8001", True),
        ("10.0.0.0/8", "11.1.2.3:8001", False),
        ("", "[::1]:8001", True),
        ("", "127.8.8.8:8001", True),
        ("", "0.0.0.0:8001", True),
        ("", "unix:/run/triton.sock", True),
        ("fd00::/8", "[fd00::1]:8001", True),
    ],
)
def test_no_proxy_is_respected(monkeypatch, excluded, address, direct):
    """By hand, after gRPC's documentation of ``no_proxy``: domains, addresses and networks; and ``*``, as in curl."""
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("no_proxy", excluded)
    assert proxy_variable(address) == (None if direct else "http_proxy")
    assert channel_options(address) == ([("grpc.enable_http_proxy", 0)] if direct else [])


def test_the_variables_of_grpc_have_precedence(monkeypatch):
    """Written after gRPC's documentation of its environment variables: ``grpc_proxy`` comes first, ``no_grpc_proxy``
    replaces ``no_proxy``, and upper-case names are not read.
    """
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:3128")
    assert proxy_variable("recommender.example:8001") is None
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("grpc_proxy", "http://proxy.example:3128")
    assert proxy_variable("recommender.example:8001") == "grpc_proxy"
    monkeypatch.setenv("no_proxy", "recommender.example")
    monkeypatch.setenv("no_grpc_proxy", "other.example")
    assert proxy_variable("recommender.example:8001") == "grpc_proxy"
