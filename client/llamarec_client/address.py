"""The server's address: whether it is one, what it resolves to, and whether gRPC connects to it through a proxy."""

import os
import re
import socket
from collections.abc import Iterable
from ipaddress import ip_address, ip_network
from reprlib import repr as short

from llamarec_client.checks import is_unicode
from llamarec_client.errors import InvalidRequest

PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
"""Environment variables that gRPC reads, in this order; it ignores their upper-case forms."""
NO_PROXY_VARIABLES = ("no_grpc_proxy", "no_proxy")
RESOLVERS = re.compile(r"(dns|ipv4|ipv6|unix|unix-abstract|vsock|xds):")
"""Start of a target in gRPC's own notation, such as ``dns:///host:port``, which gRPC checks itself."""
DNS = "dns:///"
"""Start of an address whose name the client resolves itself, to all of its servers; gRPC would use only one of them."""
LOCAL_SOCKETS = ("unix:", "unix-abstract:", "vsock:")
LOOPBACK = ("localhost", "127.0.0.0/8", "::1", "0.0.0.0", "::")
"""Hosts and networks that are this machine."""
EXAMPLE = "give host:port, as in 127.0.0.1:8001"


def check_address(url: object) -> str:
    """Return ``url`` if it is ``host:port``, ``[ipv6]:port`` or a target in gRPC's own notation.

    Raises:
        InvalidRequest: it is not; the message says which part is missing or too much.
    """
    if not isinstance(url, str) or not url or not is_unicode(url) or re.search(r"\s", url):
        raise InvalidRequest(f"the address {short(url)} is not one: {EXAMPLE}")
    if url.startswith(DNS):
        check_address(url.removeprefix(DNS))
        return url
    if RESOLVERS.match(url):
        return url
    if scheme := re.match(r"([a-zA-Z][a-zA-Z0-9+.-]*)://", url):
        encrypted = ", and tls=Tls() for an encrypted connection" if scheme[1].lower() in ("https", "grpcs") else ""
        raise InvalidRequest(
            f"the address {url!r} begins with a scheme: leave {scheme[0]} out and give host:port of the gRPC endpoint,"
            f" by default port 8001{encrypted}"
        )
    host, colon, port = url.rpartition(":")
    if "/" in url:
        raise InvalidRequest(f"the address {url!r} has a path: {EXAMPLE}")
    if not url.startswith("[") and url.count(":") > 1:
        raise InvalidRequest(f"the address {url!r} is an IPv6 address without brackets: write it as in [::1]:8001")
    if not colon or url.endswith("]"):
        raise InvalidRequest(f"the address {url!r} has no port: add the port of the gRPC endpoint, by default :8001")
    if not host.strip("[]"):
        raise InvalidRequest(f"the address {url!r} has no host: {EXAMPLE}")
    if not (port.isascii() and port.isdecimal() and 1 <= int(port[:6]) <= 65_535):
        raise InvalidRequest(f"the address {url!r} has the port {port!r}: a port is a number from 1 to 65535")
    return url


def check_addresses(urls: object) -> list[str]:
    """Return the addresses of one or more servers, each once; see :func:`check_address`.

    Raises:
        InvalidRequest: there is none, or one of them is not an address.
    """
    if isinstance(urls, (str, bytes)) or not isinstance(urls, Iterable):
        return [check_address(urls)]
    try:
        given = list(urls)
    except TypeError:  # a NumPy array without dimensions is an Iterable by its type alone
        return [check_address(urls)]
    addresses = list(dict.fromkeys(check_address(url) for url in given))
    if not addresses:
        raise InvalidRequest(f"the list of addresses is empty: {EXAMPLE}")
    return addresses


def resolve(name: str) -> list[str]:
    """Return the address of each server of a name, both ``host:port``.

    Raises:
        OSError: the name cannot be resolved.
    """
    host, _, port = name.rpartition(":")
    found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    hosts = dict.fromkeys(str(address[0]) for *_, address in found)
    return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts]


def channel_options(url: str) -> list[tuple[str, int]]:
    """Return the channel options for an address: no proxy for this machine and for what ``no_proxy`` lists."""
    return [("grpc.enable_http_proxy", 0)] if _is_direct(url) else []


def proxy_variable(url: str) -> str | None:
    """Return the environment variable that makes gRPC connect to ``url`` through a proxy; None if there is none."""
    if _is_direct(url):
        return None
    return next((name for name in PROXY_VARIABLES if os.environ.get(name)), None)


def _is_direct(url: str) -> bool:
    """Return whether an address is on this machine, or excluded from proxies as gRPC does it, or by ``*``."""
    host = url.rpartition(":")[0].strip("[]").lower()
    excluded = next(filter(None, map(os.environ.get, NO_PROXY_VARIABLES)), "")
    names = [name.strip().lower().lstrip(".") for name in excluded.split(",")]
    return url.startswith(LOCAL_SOCKETS) or any(_covers(name, host) for name in (*LOOPBACK, *names))


def _covers(name: str, host: str) -> bool:
    """Return whether ``name``, a domain, an address, a network or ``*``, covers a host."""
    try:
        return ip_address(host) in ip_network(name, strict=False)
    except ValueError:  # at least one is not an address
        return name in ("*", host) or bool(name and host.endswith(f".{name}"))
