"""The connections of a client: addresses, certificates and gRPC options, and the state that its calls share."""

import os
import threading
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any, Generic, Literal, TypeVar

from llamarec_client.address import channel_options, check_addresses
from llamarec_client.checks import seconds, text
from llamarec_client.contract import RETRIEVAL_ENSEMBLE
from llamarec_client.errors import ClientError, InvalidRequest
from llamarec_client.releases import ReleaseComparison
from llamarec_client.resolver import Resolver
from llamarec_client.retries import Call, RetryBudget
from llamarec_client.servers import Server

MAX_TIMEOUT = 1e9
"""Seconds. gRPC and Triton count in nanoseconds, and overflow beyond some multiple of this."""
KEEP_ALIVE = 20.0
"""Seconds without traffic during a call after which the connection is probed."""
MIN_KEEP_ALIVE, MAX_KEEP_ALIVE = 0.1, 1e6
"""Seconds. A shorter one would close working connections, and gRPC cannot represent a much longer one."""
CHANNEL_OPTIONS = {
    "grpc.max_send_message_length": -1,
    "grpc.max_receive_message_length": -1,
    # With the defaults, a client reconnects to a restarted server only after a second or more.
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 500,
    # Despite its name, the time that an attempt to connect may take; a TLS handshake over a slow link needs several
    # round trips.
    "grpc.min_reconnect_backoff_ms": 5_000,
}

Fallback = Literal["retriever"]
Client = TypeVar("Client")


@dataclass(frozen=True)
class Tls:
    """Certificates for an encrypted connection, each a PEM file."""

    root_certificates: Path | None = None
    """Certificate of the authority that signed the server's. Default: gRPC's own list."""
    certificate_chain: Path | None = None
    """The client's certificate, for mutual TLS; needs ``private_key``."""
    private_key: Path | None = None


class Connection:
    """Settings that both clients share: the servers, the channels' options and the retry budget."""

    def __init__(self, url: str | Sequence[str], tls: Tls | None, keep_alive: float) -> None:
        addresses = check_addresses(url)
        probe = round(1000 * max(seconds("keep_alive", keep_alive, MAX_KEEP_ALIVE), MIN_KEEP_ALIVE))
        self._options: dict[str, Any] = {
            **CHANNEL_OPTIONS,
            "grpc.keepalive_time_ms": probe,
            "grpc.keepalive_timeout_ms": min(probe, 10_000),
            "grpc.http2.ping_timeout_ms": min(probe, 10_000),  # a minute by default, regardless of the line above
        }
        self._tls = {} if tls is None else {"ssl": True, **_certificates(tls)}
        self.url = ", ".join(addresses)
        self.resolver = Resolver(addresses)
        self.releases = ReleaseComparison(self.resolver.servers, self.channel)
        self.budget = RetryBudget()
        self.closed = False

    def channel(self, server: Server) -> dict[str, Any]:
        """Return the arguments of tritonclient's client of a server."""
        options = {**self._options, **dict(channel_options(server.name))}
        if server.address != server.name:
            # The certificate, and proxies on the way, know the name and not the address that it resolved to.
            options["grpc.default_authority"] = server.name
        return {"url": server.address, "channel_args": list(options.items()), **self._tls}

    def call(self, model: str, timeout: float, fallback: Fallback | None, request_id: str | None) -> Call:
        """Return the state of a new call.

        Raises:
            InvalidRequest: an argument is not what it has to be.
        """
        model = text("model", model)
        limit = seconds("timeout", timeout, MAX_TIMEOUT)
        if fallback is not None and not (isinstance(fallback, str) and fallback == "retriever"):
            raise InvalidRequest(f"fallback is {short(fallback)}: give 'retriever' or None")
        second = RETRIEVAL_ENSEMBLE if fallback and model != RETRIEVAL_ENSEMBLE else None
        request_id = uuid.uuid4().hex if request_id is None or request_id == "" else text("request_id", request_id)
        self.releases.start_if_due()
        return Call(self.resolver.servers, model, request_id, limit, second, self.budget)

    def refresh(self, call: Call) -> Callable[[], bool] | None:
        """Look names up again if that is due; return a function that waits for it if the call has to."""
        return self.resolver.refresh(call.timeout())

    def attempt(self, call: Call) -> AbstractContextManager[Server]:
        """Return the context of a call's next attempt; see :meth:`Call.attempt`.

        Raises:
            ServerUnavailable: the names of all servers cannot be resolved.
        """
        if not self.resolver.servers.members():
            error = self.resolver.unresolved()
            error.request_id = call.request_id
            raise error
        return call.attempt()

    def failure(self, error: BaseException) -> ClientError:
        """Return the error of this package for one that gRPC raised without a status, because nothing was sent."""
        if self.closed:
            return InvalidRequest(f"the client of {self.url} is closed: open a new one")
        remedy = ": use an asyncio client in the event loop that opened it" if "loop" in str(error) else ""
        return ClientError(f"the request to {self.url} could not be sent ({type(error).__name__}: {error}){remedy}")


def _certificates(tls: Tls) -> dict[str, str | None]:
    """Return the certificates' files by tritonclient's names for them.

    Raises:
        InvalidRequest: a file is missing, or ``tls`` is something else.
    """
    if not isinstance(tls, Tls):
        raise InvalidRequest(f"tls is {short(tls)}: give Tls(...) or None")
    files = {
        "root_certificates": tls.root_certificates,
        "certificate_chain": tls.certificate_chain,
        "private_key": tls.private_key,
    }
    for name, path in files.items():
        if path is not None and not (isinstance(path, (str, Path)) and os.path.isfile(path)):
            raise InvalidRequest(f"{name} {path} is not a file: give a PEM file")
    if (tls.certificate_chain is None) != (tls.private_key is None):
        raise InvalidRequest("mutual TLS needs both certificate_chain and private_key: give the missing one")
    return {name: None if path is None else str(path) for name, path in files.items()}


class Channels(Generic[Client]):
    """tritonclient's clients of the servers, each opened for the first request to its server.

    Args:
        client: tritonclient's class.
        connection: the settings.

    Raises:
        ClientError: gRPC does not take the settings, or there is no event loop to run in.
    """

    def __init__(self, client: Callable[..., Client], connection: Connection) -> None:
        self._client = client
        self._connection = connection
        self._lock = threading.Lock()
        self._open: dict[Server, Client] = {}
        for server in connection.resolver.servers.members():
            self.to(server)

    def to(self, server: Server) -> Client:
        """Return the client of a server.

        Raises:
            ClientError: see the class.
        """
        with self._lock:
            if server not in self._open:
                self._open[server] = self._opened(server)
            return self._open[server]

    def unused(self) -> list[Client]:
        """Return the clients of servers that are in no list any more and have answered everything, to be closed."""
        with self._lock:
            gone = self._connection.resolver.servers.drained()
            return [self._open.pop(server) for server in gone if server in self._open]

    def close(self) -> list[Client]:
        """Mark the connection as closed, and return all clients, to be closed."""
        self._connection.closed = True
        with self._lock:
            return list(self._open.values())

    def _opened(self, server: Server) -> Client:
        if self._connection.closed:
            raise self._connection.failure(RuntimeError())
        try:
            return self._client(**self._connection.channel(server))
        except Exception as error:
            remedy = ": open an asyncio client inside a coroutine" if "loop" in str(error) else ""
            raise ClientError(f"cannot open a connection to {server.address} ({error}){remedy}") from error
