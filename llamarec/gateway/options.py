"""What a gateway is told at its start: the servers, its own address, limits, and certificates."""

import ipaddress
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from preprocessing.errors import InputError


@dataclass(frozen=True, kw_only=True)
class GatewayOptions:
    """Options of a gateway.

    Raises:
        InputError: a value is out of range.
    """

    servers: Sequence[str] = ("127.0.0.1:8001",)
    """Addresses of the servers' gRPC endpoints, as `RecommenderClient` takes them."""
    host: str = "127.0.0.1"
    """Address of the interface to listen on."""
    port: int = 8090
    """Port to listen on; 0 for a free one."""
    timeout: float = 30.0
    """Seconds until a request fails. A caller can shorten it with ``X-Request-Timeout``, but not extend it."""
    body_bytes: int = 4 * 2**20
    """Maximum size of a request's body."""
    in_flight: int = 256
    """Maximum number of requests in flight; further ones are refused. With ``body_bytes`` it bounds the memory."""
    drain_seconds: int = 20
    """Seconds that requests in flight have after SIGTERM before they are cancelled."""
    certificate: Path | None = None
    """PEM file with the gateway's certificate, for HTTPS."""
    private_key: Path | None = None
    """PEM file with the private key of ``certificate``."""

    def __post_init__(self) -> None:
        if not (0 < self.timeout <= 3600 and math.isfinite(self.timeout)):
            raise InputError(f"--timeout {self.timeout:g} is out of range: give seconds above 0, at most 3,600")
        for name, value in (("body-bytes", self.body_bytes), ("in-flight", self.in_flight)):
            if value < 1:
                raise InputError(f"--{name} {value} is out of range: give at least 1")
        if self.drain_seconds < 0:
            raise InputError(f"--drain-seconds {self.drain_seconds} is out of range: give 0 or more")
        if not 0 <= self.port <= 65535:
            raise InputError(f"--port {self.port} is not a port: give a number from 0 to 65535")
        if (self.certificate is None) != (self.private_key is None):
            raise InputError("HTTPS needs both --certificate and --private-key: give the missing one")
        for path in (self.certificate, self.private_key):
            if path is not None and not path.is_file():
                raise InputError(f"{path} is not a file: give a PEM file")

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the gateway."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
