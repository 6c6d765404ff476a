"""When a call is tried again, when the retriever is asked instead, and when it is over. No input or output here."""

import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from tritonclient.utils import InferenceServerException

from llamarec_client.contract import DEGRADED
from llamarec_client.errors import ClientError, Overloaded, RequestTimeout, ServerError, ServerUnavailable, StepDied
from llamarec_client.messages import client_error

RETRY_SHARE = 0.1
"""Retries over requests, at most: a server that refuses everything gets a tenth more load, not a multiple."""
RETRY_BURST = 10.0
"""Retries that a client may have saved up, so that a short blip is bridged at any rate of requests."""
MAX_ATTEMPTS = 3
"""Of one call at one model while the server is unavailable."""
FIRST_PAUSE = 0.1
"""Seconds; the pause before retry n is drawn evenly from 0 to ``FIRST_PAUSE * 2**(n-1)``, so that clients spread out
(Brooker 2015, "Exponential Backoff And Jitter": full jitter)."""
FALLBACK_SHARE = 0.1
"""Part of the deadline that is kept for the fallback."""
FALLBACK_RESERVE = 0.25
"""Seconds kept for the fallback at most: the retriever answers in milliseconds."""


class RetryBudget:
    """Retries that all calls of a client share: each request earns a tenth of one (Finagle's retry budget)."""

    def __init__(self, share: float = RETRY_SHARE, burst: float = RETRY_BURST) -> None:
        """Args:
        share: what each request adds.
        burst: most that can be saved up, and what there is at first.
        """
        self._share, self._burst, self._saved = share, burst, burst
        self._lock = threading.Lock()

    def earn(self) -> None:
        """A request begins."""
        with self._lock:
            self._saved = min(self._saved + self._share, self._burst)

    def spend(self) -> bool:
        """Takes one retry, if there is one."""
        with self._lock:
            if self._saved < 1:
                return False
            self._saved -= 1
            return True


@dataclass
class Call:
    """One call on its way through its attempts. The client sends what :meth:`timeout` and ``model`` say, and after a
    failure waits as long as :meth:`pause_after` says or gets its error.
    """

    url: str
    model: str
    """Asked next."""
    request_id: str
    seconds: float
    """Deadline of the whole call."""
    fallback: str | None
    """The model to ask when the first one is refused, dead or too slow."""
    budget: RetryBudget
    degraded: str = ""
    """Why the fallback is asked: the name of the first model's error."""
    _attempts: int = field(default=0, init=False)
    _end: float = field(init=False)

    def __post_init__(self) -> None:
        self._end = time.monotonic() + self.seconds
        self.budget.earn()

    def timeout(self) -> float:
        """Seconds that the next attempt may take; with a fallback ahead, some are kept for it."""
        left = self._end - time.monotonic()
        if self.fallback:
            left -= min(FALLBACK_RESERVE, FALLBACK_SHARE * self.seconds)
        return max(left, 0.0)

    def pause_after(self, failure: InferenceServerException) -> float:
        """Seconds to wait before the next attempt.

        Raises:
            ClientError: there is none; what the failure means.
        """
        error = client_error(failure, self.url, self.model, self.seconds)
        error.request_id = self.request_id
        self._attempts += 1
        pause = random.uniform(0, FIRST_PAUSE * 2 ** (self._attempts - 1))
        if self._attempts < self._allowed(error) and pause < self.timeout() and self.budget.spend():
            return pause
        if self.fallback and isinstance(error, (ServerUnavailable, ServerError, RequestTimeout)):
            self.model, self.fallback, self.degraded = self.fallback, None, type(error).__name__
            return 0.0
        raise error from failure

    def _allowed(self, error: ClientError) -> int:
        """Attempts at one model that end with such an error."""
        if isinstance(error, StepDied):
            return 2  # another instance may be alive
        if isinstance(error, Overloaded) and self.fallback:
            return 1  # the fallback has room; asking again would only fill the queue
        return MAX_ATTEMPTS if isinstance(error, ServerUnavailable) else 1

    def arguments(self) -> dict[str, Any]:
        """What tritonclient's ``infer`` needs for the next attempt, beside the tensors."""
        seconds = self.timeout()
        return {
            "model_name": self.model,
            "request_id": self.request_id,
            "client_timeout": seconds,
            # Sent along too: the ranker cannot see gRPC's deadline of a request that waits in its queue.
            "timeout": round(seconds * 1e6),
            "parameters": {DEGRADED: self.degraded} if self.degraded else None,
        }
