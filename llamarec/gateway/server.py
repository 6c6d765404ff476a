"""Runs a gateway until it is told to stop."""

import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from llamarec.gateway.admission import Admission
from llamarec.gateway.app import create_app
from llamarec.gateway.keys import ApiKeys
from llamarec.gateway.options import GatewayOptions
from llamarec.web import listen, web_server
from llamarec_client import AsyncRecommenderClient, RecommenderClient, Tls
from preprocessing.errors import InputError


class _Server(uvicorn.Server):
    """uvicorn's server, which says when callers can connect, and refuses new requests from the first signal on."""

    def __init__(self, settings: uvicorn.Config, admission: Admission, started: Callable[[], None]) -> None:
        super().__init__(settings)
        self._admission, self._started = admission, started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._admission.draining = True
        super().handle_exit(sig, frame)


def run(
    options: GatewayOptions,
    keys: ApiKeys,
    tls: Tls | None,
    announce: Callable[[str], None],
    page: ASGIApp | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; requests in flight are finished first, within ``options.drain_seconds``.

    Args:
        options: addresses, limits and deadline.
        keys: keys of the callers.
        tls: certificates for the connections to the servers; None for connections without encryption.
        announce: called with the gateway's address when callers can connect.
        page: the demo's page, if it is to be served too.

    Raises:
        InputError: the port is taken, or a certificate cannot be used.
        InvalidRequest: an address of a server, or a certificate for the connection, is not what it has to be.
    """
    servers = list(options.servers)
    RecommenderClient(servers, tls=tls).close()  # checks addresses and certificates; the servers may be down for now
    admission = create_app(options, keys, lambda: AsyncRecommenderClient(servers, tls=tls), page)
    settings = web_server(
        admission,
        options.host,
        options.port,
        server_header=False,
        proxy_headers=False,  # nothing here uses the address of the caller
        timeout_graceful_shutdown=options.drain_seconds,
        ssl_certfile=options.certificate,
        ssl_keyfile=options.private_key,
    )
    try:
        settings.load()
    except OSError as error:  # of which ssl.SSLError is one
        raise InputError(f"--certificate {options.certificate} cannot be used: {error}") from None
    bound = listen(settings, "--port")
    url = f"{'https' if options.certificate else 'http'}://{_shown(options.host)}:{bound.getsockname()[1]}"
    # uvicorn repeats the signal when it has stopped: an orderly end is no failure.
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        _Server(settings, admission, lambda: announce(url)).run(sockets=[bound])
    finally:
        signal.signal(signal.SIGTERM, before)


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
