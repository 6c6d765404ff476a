"""Sets up the web servers: the page of `llamarec demo --ui`, and `llamarec gateway`."""

import socket
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from preprocessing.errors import InputError


def web_server(app: ASGIApp, host: str, port: int, **more: Any) -> uvicorn.Config:
    """Return uvicorn's configuration for an application.

    Args:
        app: the application.
        host: name or address of the interface to listen on.
        port: 0 for a free one.
        more: further settings of uvicorn.
    """
    # uvicorn's own logging configuration would close the existing handlers, and with absl's handler its stream.
    return uvicorn.Config(app, host=host, port=port, log_level="warning", log_config=None, access_log=False, **more)


def listen(settings: uvicorn.Config, option: str) -> socket.socket:
    """Return the socket on which the server is to listen.

    Raises:
        InputError: the address or the port cannot be used; the message names the ``option`` with the port.
    """
    try:
        bound = settings.bind_socket()
    except SystemExit:
        raise InputError(
            f"port {settings.port} of {settings.host} is in use or not allowed: give another {option}"
        ) from None
    # asyncio does this only for sockets that were made with the protocol's number, and uvicorn's was not. Connections
    # inherit it. Without it, the body of an answer waits up to 40 ms for the caller's delayed acknowledgement.
    bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return bound
