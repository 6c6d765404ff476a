"""Chooses the server of each request: of those that answer, the one with the fewest requests in flight. Does no I/O."""

import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

FIRST_PAUSE_S = 0.5
"""Seconds for which a server is left out after its first failure; each further failure doubles them."""
LONGEST_PAUSE_S = 30.0
"""Maximum of it: a server that comes back is found after this time at the latest."""


class Server(NamedTuple):
    """One server of a client."""

    address: str
    """``host:port`` that the client connects to."""
    name: str
    """``host:port`` that was given: the name in the server's certificate and in ``no_proxy``. It differs from the
    address if it was resolved."""


class Outcome(Enum):
    """What a request says about its server."""

    ANSWERED = auto()
    """The server works, even if it refused this request as invalid."""
    OVERLOADED = auto()
    """The server works, but has no capacity now. It is left out for the first pause only."""
    FAILED = auto()
    """The server failed, was too slow, or could not be reached."""
    UNKNOWN = auto()
    """Nothing, because the caller cancelled the request."""


@dataclass(eq=False)
class _State:
    """What is known of one server."""

    server: Server
    in_flight: int = 0
    last_turn: int = 0
    failures: int = 0
    """Number of failures since the last answer; the server is left out unless it is 0."""
    due: float = 0.0
    """Time at which a server that is left out may be tried."""
    in_trial: bool = False
    """Whether a request is trying a server that is left out."""
    change: int = 0
    """Number of times that the server was left out or came back. The outcome of a request that was sent before the last
    of them says nothing new: when a server dies, all its requests in flight fail, and they are one failure."""

    def is_ready(self, now: float) -> bool:
        return not self.failures or (now >= self.due and not self.in_trial)


@dataclass(frozen=True, eq=False)
class Turn:
    """One request to one server, from :meth:`Servers.choose` to :meth:`Servers.release`."""

    state: _State
    change: int

    @property
    def server(self) -> Server:
        """Server that gets the request."""
        return self.state.server


class Servers:
    """The servers of a client and their requests in flight; threads can share it.

    A server that fails is left out for a pause. After the pause one request tries it: its answer brings the server
    back, and its failure doubles the pause. If all servers are left out, they are asked nevertheless, so that a client
    with one server always asks that one.

    Args:
        servers: the servers.
        clock: returns the time in seconds.
    """

    def __init__(self, servers: Iterable[Server] = (), clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._turns = 0
        self._members: dict[Server, _State] = {}
        self._draining: dict[Server, _State] = {}
        self.replace(servers)

    def replace(self, servers: Iterable[Server]) -> None:
        """Change the list of servers. The others get no new requests; those in flight go on until they end."""
        with self._lock:
            known = self._draining | self._members
            self._members = {server: known.get(server) or _State(server) for server in servers}
            self._draining = {server: state for server, state in known.items() if server not in self._members}

    def drained(self) -> list[Server]:
        """Return, once each, the servers that are no longer in the list and have no request in flight."""
        with self._lock:
            idle = [server for server, state in self._draining.items() if not state.in_flight]
            for server in idle:
                del self._draining[server]
            return idle

    def members(self) -> list[Server]:
        """Return the list of servers."""
        with self._lock:
            return list(self._members)

    def choose(self, tried: Collection[Server] = ()) -> Turn:
        """Return the turn of a request, which :meth:`release` ends.

        Of the servers that are not left out, or whose pause is over, it goes to the one with the fewest requests in
        flight; of equal ones, to the one that was chosen least recently. If all are left out, each failure of a server
        counts as a request in flight: a dead one, which has none, must not attract those that a slow one may answer.

        Args:
            tried: servers at which the same request failed; they are chosen only if there is no other.
        """
        with self._lock:
            now = self._clock()

            def order(state: _State) -> tuple[bool, bool, int, int]:
                ready = state.is_ready(now)
                load = state.in_flight + (0 if ready else state.failures)
                return not ready, state.server in tried, load, state.last_turn

            chosen = min(self._members.values(), key=order)
            self._turns += 1
            chosen.in_flight += 1
            chosen.last_turn = self._turns
            chosen.in_trial = chosen.failures > 0
            return Turn(chosen, chosen.change)

    def release(self, turn: Turn, outcome: Outcome) -> None:
        """End a turn, and learn from its outcome whether the server works."""
        state = turn.state
        with self._lock:
            state.in_flight -= 1
            if turn.change != state.change:
                return
            if outcome is Outcome.UNKNOWN:
                state.in_trial = False
            elif outcome is not Outcome.ANSWERED:
                state.failures = 1 if outcome is Outcome.OVERLOADED else state.failures + 1
                # The exponent is limited, because a float overflows after a thousand failures.
                pause = min(FIRST_PAUSE_S * 2 ** min(state.failures - 1, 30), LONGEST_PAUSE_S)
                state.due = self._clock() + pause
                state.in_trial = False
                state.change += 1
            elif state.failures:
                state.failures = 0
                state.in_trial = False
                state.change += 1

    def has_other(self, tried: Collection[Server]) -> bool:
        """Return whether a server that was not tried may be asked now."""
        with self._lock:
            now = self._clock()
            return any(state.is_ready(now) for server, state in self._members.items() if server not in tried)

    def some_failed(self) -> bool:
        """Return whether a server is left out."""
        with self._lock:
            return any(state.failures for state in self._members.values())

    def all_failed(self) -> bool:
        """Return whether every server is left out."""
        with self._lock:
            return all(state.failures for state in self._members.values())
