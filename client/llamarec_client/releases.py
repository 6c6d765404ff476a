"""Compares the releases that the servers of one client serve, in the background."""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from llamarec_client.contract import ENSEMBLE
from llamarec_client.servers import Server, Servers

CHECK_S = 60.0
"""Seconds between two comparisons, while there are requests."""
CONFIRM_S = 2.0
"""Seconds after which a difference is looked at again: a promotion switches one server after the other."""
ASK_S = 2.0
"""Maximum time in seconds for a server to name its release."""
NO_RELEASE = "no release"
"""What a server has whose repository is none of releases."""
log = logging.getLogger("llamarec_client")


class ReleaseComparison:
    """Warns if the servers of a client serve different releases, whose answers then depend on the server.

    Args:
        servers: the client's servers.
        channel: returns the arguments of tritonclient's client of a server.
    """

    def __init__(self, servers: Servers, channel: Callable[[Server], dict[str, Any]]) -> None:
        self._servers, self._channel = servers, channel
        self._lock = threading.Lock()
        self._due = 0.0
        self.differences = 0
        """Number of comparisons that found different releases."""

    def start_if_due(self) -> None:
        """Start a comparison in a thread of its own if there are several servers and the last one is long ago."""
        now = time.monotonic()
        if now < self._due or len(self._servers.members()) < 2:
            return
        with self._lock:
            if now < self._due:
                return
            self._due = now + CHECK_S
        threading.Thread(target=self._compare, daemon=True).start()

    def _compare(self) -> None:
        if not _differ(self._releases()):
            return
        time.sleep(CONFIRM_S)
        found = self._releases()
        if _differ(found):
            self.differences += 1
            listed = ", ".join(f"{address}: {release}" for address, release in sorted(found.items()))
            log.warning("the servers of one client serve different releases (%s): promote one on all of them", listed)

    def _releases(self) -> dict[str, str]:
        """Return the release of each server that answers, by its address."""
        found = {}
        for server in self._servers.members():
            try:
                with closing(grpc.InferenceServerClient(**self._channel(server))) as client:
                    found[server.address] = served_release(client.get_model_config(ENSEMBLE, client_timeout=ASK_S))
            except InferenceServerException:
                continue  # requests to this server fail too, and say why
        return found


def served_release(answer: Any) -> str:
    """Return the release of an ensemble from the response with its configuration: its steps' names end with it."""
    steps = [step.model_name for step in answer.config.ensemble_scheduling.step]
    return steps[0].partition("_")[2] or NO_RELEASE if steps else NO_RELEASE


def _differ(releases: dict[str, str]) -> bool:
    return len(set(releases.values())) > 1
