"""HTTP endpoint for orchestrators: `/live`, `/ready` and `/metrics` of a supervised server."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from serving.errors import ServerFailure

Health = dict[str, Any]
"""``{"ready": bool, "steps": {model: {"alive", "healing", "revived", "reason"}}}``."""
POLL_SECONDS = 0.05
"""Maximum time in seconds that :meth:`HealthEndpoint.close` waits for the thread; half a second by default."""


class HealthEndpoint:
    """HTTP endpoint that reports the health of a server, in a thread of its own.

    Args:
        port: port on all interfaces; 0 for a free one.
        health: function that returns the current health; called for every request.

    Raises:
        ServerFailure: the port cannot be used.
    """

    def __init__(self, port: int, health: Callable[[], Health]) -> None:
        try:
            self._server = _HealthServer(("", port), _Handler)
        except (OSError, OverflowError) as error:
            raise ServerFailure(f"--health-port {port} cannot be used: {error}") from None
        self._server.health = health
        threading.Thread(target=self._server.serve_forever, args=(POLL_SECONDS,), daemon=True).start()

    @property
    def port(self) -> int:
        """Port of the endpoint."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()


class _HealthServer(ThreadingHTTPServer):
    health: Callable[[], Health]


class _Handler(BaseHTTPRequestHandler):
    server: _HealthServer

    def do_GET(self) -> None:
        health = self.server.health()
        if self.path == "/live":  # the supervisor revives steps itself: only its own death calls for a restart
            self._answer(200, "text/plain", "alive\n")
        elif self.path == "/ready":
            self._answer(200 if health["ready"] else 503, "application/json", json.dumps(health) + "\n")
        elif self.path == "/metrics":
            self._answer(200, "text/plain; version=0.0.4", health_metrics(health))
        else:
            self._answer(404, "text/plain", "/live, /ready or /metrics\n")

    def _answer(self, status: int, kind: str, text: str) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Log nothing: orchestrators probe every few seconds."""


def health_metrics(health: dict[str, Any]) -> str:
    """Return the supervisor's own metrics in the Prometheus text format."""
    lines = ["# TYPE llamarec_ready gauge", f"llamarec_ready {int(health['ready'])}"]
    lines.append("# TYPE llamarec_step_up gauge")
    lines += [f'llamarec_step_up{{model="{name}"}} {int(step["alive"])}' for name, step in health["steps"].items()]
    lines.append("# TYPE llamarec_step_revived_total counter")
    lines += [
        f'llamarec_step_revived_total{{model="{name}"}} {step["revived"]}' for name, step in health["steps"].items()
    ]
    return "\n".join(lines) + "\n"
