"""Keeps the list of a client's servers up to date with the names that were given as ``dns:///name:port``."""

import random
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from llamarec_client.address import DNS, resolve
from llamarec_client.errors import ServerUnavailable
from llamarec_client.servers import Server, Servers

LOOK_UP_S = 30.0
"""Seconds between two look-ups of the names, while there are requests."""
LOOK_UP_AFTER_FAILURE_S = 2.0
"""Seconds between two look-ups while a server is left out: its replacement may have another address."""
OLD_WAIT_S = 1.0
"""Maximum time in seconds that requests wait for a look-up if there was none for twice ``LOOK_UP_S``."""


class Resolver:
    """Resolves names to servers, in a thread of its own, so that requests do not wait for the name server.

    Only two kinds of requests wait: those for which no server is known yet, and, for a second at most, those after a
    time without requests, in which all servers may have been replaced.

    Args:
        addresses: checked addresses; those that begin with ``dns:///`` are resolved, the others stay as they are.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        self._found = {url: [] if url.startswith(DNS) else [Server(url, url)] for url in addresses}
        self._names = [url for url in addresses if url.startswith(DNS)]
        self._lock = threading.Lock()
        self._began = float("-inf")
        self._running: threading.Event | None = None
        self._old = False
        """Whether the running look-up is the first one after a time without requests."""
        self._problem = "no answer in time"
        self.servers = Servers(self._shuffled())

    def refresh(self, limit: float) -> Callable[[], bool] | None:
        """Start a look-up if one is due.

        Args:
            limit: seconds that the request may wait.

        Returns:
            A function that waits for the look-up, if the request has to; otherwise None.
        """
        if not self._names:
            return None
        now = time.monotonic()
        missing = not self.servers.members()
        pause = LOOK_UP_AFTER_FAILURE_S if self.servers.some_failed() else LOOK_UP_S
        with self._lock:
            if self._running is None and (missing or now >= self._began + pause):
                self._old = now >= self._began + 2 * LOOK_UP_S
                self._began, self._running = now, threading.Event()
                threading.Thread(target=self._look_up, args=(self._running,), daemon=True).start()
            if self._running is None or not (missing or self._old):
                return None
            return partial(self._running.wait, limit if missing else min(limit, OLD_WAIT_S))

    def unresolved(self) -> ServerUnavailable:
        """Return the error of a request for which no server is known."""
        names = ", ".join(self._names)
        return ServerUnavailable(f"the host name of {names} cannot be resolved: check it ({self._problem})")

    def _look_up(self, done: threading.Event) -> None:
        """Resolve every name; one that cannot be resolved now keeps its servers."""
        for url in self._names:
            name = url.removeprefix(DNS)
            try:
                if addresses := resolve(name):
                    self._found[url] = [Server(address, name) for address in addresses]
            except (OSError, ValueError) as error:  # ValueError: no host name at all, for example a very long one
                self._problem = str(error)
        self.servers.replace(self._shuffled())
        with self._lock:
            self._running = None
        done.set()

    def _shuffled(self) -> list[Server]:
        """Return all servers in random order, so that not all clients begin with the same one."""
        servers = [server for found in self._found.values() for server in found]
        random.shuffle(servers)
        return servers
