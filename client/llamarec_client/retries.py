"""Decides whether a failed call is retried, sent to the fallback or given up; does no I/O."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tritonclient.utils import InferenceServerException

from llamarec_client.contract import DEGRADED
from llamarec_client.errors import (
    ClientError,
    InvalidRequest,
    Overloaded,
    RequestTimeout,
    ServerError,
    ServerUnavailable,
    StepDied,
)
from llamarec_client.messages import client_error
from llamarec_client.servers import Outcome, Server, Servers

RETRY_SHARE = 0.1
"""Maximum ratio of retries to requests: a server that refuses everything gets a tenth more load, not a multiple."""
RETRY_BURST = 10.0
"""Maximum number of saved retries, with which a client bridges a short outage at any request rate."""
MAX_ATTEMPTS = 3
"""Maximum number of attempts of one call at one model while the server is unavailable. With more servers than this, a
call for which none can be reached asks each of them once."""
FIRST_PAUSE = 0.1
"""Seconds. The pause before retry n is uniform from 0 to ``FIRST_PAUSE * 2**(n-1)``, so that clients spread out
(Brooker 2015, "Exponential Backoff And Jitter": full jitter)."""
FALLBACK_SHARE = 0.1
"""Share of the deadline that is reserved for the fallback."""
FALLBACK_RESERVE = 0.25
"""Maximum number of seconds reserved for the fallback; the retriever answers in milliseconds."""


class RetryBudget:
    """Retries that all calls of a client share: each request earns a tenth of one (Finagle's retry budget).

    Args:
        share: number of retries that each request adds.
        burst: maximum number of saved retries, and the number at the start.
    """

    def __init__(self, share: float = RETRY_SHARE, burst: float = RETRY_BURST) -> None:
        self._share, self._burst, self._saved = share, burst, burst
        self._lock = threading.Lock()

    def earn(self) -> None:
        """Add the share of a new request."""
        with self._lock:
            self._saved = min(self._saved + self._share, self._burst)

    def spend(self) -> bool:
        """Take one retry, and return whether there was one."""
        with self._lock:
            if self._saved < 1:
                return False
            self._saved -= 1
            return True


@dataclass
class Call:
    """State of one call across its attempts.

    The client sends the request to ``model`` with :meth:`timeout`, within :meth:`attempt`, which chooses the server.
    After a failure it waits for the time that :meth:`pause_after` returns, or fails with the error that it raises.
    """

    servers: Servers
    model: str
    """Model of the next attempt."""
    request_id: str
    seconds: float
    """Deadline of the whole call."""
    fallback: str | None
    """Model to call if the first one refuses the request, is dead or is too slow."""
    budget: RetryBudget
    degraded: str = ""
    """Reason for the fallback: the name of the first model's error."""
    _attempts: int = field(default=0, init=False)
    _tried: set[Server] = field(default_factory=set, init=False)
    """Servers at which ``model`` failed."""
    _error: ClientError = field(init=False)
    """Error of the last attempt."""
    _end: float = field(init=False)

    def __post_init__(self) -> None:
        self._end = time.monotonic() + self.seconds
        self.budget.earn()

    def timeout(self) -> float:
        """Return the seconds that the next attempt may take, without the time reserved for a fallback."""
        left = self._end - time.monotonic()
        if self.fallback:
            left -= min(FALLBACK_RESERVE, FALLBACK_SHARE * self.seconds)
        return max(left, 0.0)

    @contextmanager
    def attempt(self) -> Iterator[Server]:
        """Yield the server to ask, and record what happens to the request within the context."""
        turn = self.servers.choose(self._tried)
        outcome = Outcome.UNKNOWN
        try:
            yield turn.server
            outcome = Outcome.ANSWERED
        except InferenceServerException as failure:
            several = len(self.servers.members()) > 1
            self._error = client_error(failure, turn.server, self.model, self.seconds, several=several)
            self._tried.add(turn.server)
            if isinstance(self._error, InvalidRequest):
                outcome = Outcome.ANSWERED
            else:
                outcome = Outcome.OVERLOADED if isinstance(self._error, Overloaded) else Outcome.FAILED
            raise
        finally:
            self.servers.release(turn, outcome)

    def pause_after(self, failure: InferenceServerException) -> float:
        """Return the seconds to wait before the next attempt.

        Raises:
            ClientError: there is no further attempt; the error explains the failure.
        """
        error = self._error
        error.request_id = self.request_id
        self._attempts += 1
        has_other = self.servers.has_other(self._tried)
        pause = 0.0 if has_other else random.uniform(0, FIRST_PAUSE * 2 ** (self._attempts - 1))
        if self._attempts < self._allowed(error, has_other) and pause < self.timeout() and self.budget.spend():
            return pause
        if self.fallback and isinstance(error, (ServerUnavailable, ServerError, RequestTimeout)):
            self.model, self.fallback, self.degraded = self.fallback, None, type(error).__name__
            self._tried.clear()
            return 0.0
        raise self._of_all(error) from failure

    def _allowed(self, error: ClientError, has_other: bool) -> int:
        """Return the maximum number of attempts at one model that fail with this error."""
        if isinstance(error, StepDied):
            return 2  # another instance may be alive
        if isinstance(error, Overloaded):
            # The fallback has capacity; a retry would only fill the queue, unless another server has a free one.
            return 1 if self.fallback and not has_other else MAX_ATTEMPTS
        return max(MAX_ATTEMPTS, len(self.servers.members())) if isinstance(error, ServerUnavailable) else 1

    def _of_all(self, error: ClientError) -> ClientError:
        """Return the error of the last attempt, or one that names all servers if none of several can answer."""
        servers = sorted(server.address for server in self.servers.members())
        if len(servers) < 2 or not self.servers.all_failed() or type(error) is not ServerUnavailable:
            return error
        combined = ServerUnavailable(f"none of the servers {', '.join(servers)} can answer; the last error: {error}")
        combined.request_id = error.request_id
        return combined

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of tritonclient's ``infer`` for the next attempt, except the tensors."""
        seconds = self.timeout()
        return {
            "model_name": self.model,
            "request_id": self.request_id,
            "client_timeout": seconds,
            # Also part of the request: the ranker cannot see the gRPC deadline of a request that waits in its queue.
            "timeout": round(seconds * 1e6),
            "parameters": {DEGRADED: self.degraded} if self.degraded else None,
        }
