"""Which server gets a request: a pure class with a clock of its own, by hand and against a model."""

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llamarec_client.servers import FIRST_PAUSE_S, LONGEST_PAUSE_S, Outcome, Server, Servers, Turn

A, B, C = (Server(f"{name}:8001", f"{name}:8001") for name in "abc")


class Clock:
    """A clock that goes on only when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def fail(servers: Servers, outcome: Outcome = Outcome.FAILED) -> Server:
    """Send one request that ends with an outcome, and return its server."""
    turn = servers.choose()
    servers.release(turn, outcome)
    return turn.server


def served(servers: Servers, number: int) -> list[Server]:
    """Return the servers of requests that are answered one after another."""
    return [fail(servers, Outcome.ANSWERED) for _ in range(number)]


def test_idle_servers_take_turns(clock):
    """Six requests, one after another, over three servers: each gets every third."""
    assert served(Servers([A, B, C], clock), 6) == [A, B, C, A, B, C]


def test_the_fewest_requests_in_flight_win(clock):
    """A slow server keeps its requests, so the others get the next ones: B answers at once, A and C do not."""
    servers = Servers([A, B, C], clock)
    held = []
    for _ in range(9):
        turn = servers.choose()
        if turn.server == B:
            servers.release(turn, Outcome.ANSWERED)
        else:
            held.append(turn.server)
    assert Counter(held) == {A: 1, C: 1}


def test_one_server_is_always_asked(clock):
    """There is no pause for a client with one server, however often it fails: nothing else could answer."""
    servers = Servers([A], clock)
    assert {fail(servers) for _ in range(50)} == {A}
    assert fail(servers, Outcome.ANSWERED) == A


def test_a_server_that_fails_is_tried_by_one_request_after_its_pause(clock):
    """Left out for 0.5 s; then one request goes to it, and all others elsewhere until that one is answered."""
    servers = Servers([A, B], clock)
    assert fail(servers) == A
    assert served(servers, 4) == [B] * 4
    clock.now = FIRST_PAUSE_S
    trial = servers.choose()
    assert trial.server == A
    assert served(servers, 4) == [B] * 4
    servers.release(trial, Outcome.ANSWERED)
    assert set(served(servers, 2)) == {A, B}


def test_pauses_double_up_to_a_limit(clock):
    """After failure n of one server the pause is 0.5 * 2**(n-1) s, at most 30 s; an answer begins anew."""
    servers = Servers([A, B], clock)
    for expected in [0.5, 1, 2, 4, 8, 16, 30, 30, 30]:
        assert fail(servers) == A
        clock.now += expected - 0.01
        assert served(servers, 2) == [B] * 2
        clock.now += 0.01
    assert set(served(servers, 2)) == {A, B}
    assert fail(servers) in (A, B)
    clock.now += FIRST_PAUSE_S
    assert set(served(servers, 2)) == {A, B}


def test_a_thousand_failures_do_not_overflow(clock):
    """2**1024 is no float; a server that is down for days fails that often."""
    servers = Servers([A], clock)
    for _ in range(1100):
        fail(servers)
    assert servers.all_failed()


def test_requests_that_fail_together_are_one_failure(clock):
    """Twenty requests were in flight when the server died: the pause is that of one failure."""
    servers = Servers([A, B], clock)
    turns = [servers.choose() for _ in range(40)]
    for turn in turns:
        servers.release(turn, Outcome.FAILED if turn.server == A else Outcome.ANSWERED)
    clock.now = FIRST_PAUSE_S
    assert A in served(servers, 2)


def test_an_answer_to_an_older_request_does_not_bring_a_server_back(clock):
    """It was sent before the failure, so it says nothing of the server as it is now."""
    servers = Servers([A, B], clock)
    older, newer = (next(t for t in (servers.choose(), servers.choose()) if t.server == A) for _ in range(2))
    servers.release(newer, Outcome.FAILED)
    servers.release(older, Outcome.ANSWERED)
    assert fail(servers, Outcome.ANSWERED) == B
    assert servers.some_failed()


def test_a_cancelled_trial_lets_the_next_request_try(clock):
    """Nothing is known of the server then, and it must not stay left out for ever."""
    servers = Servers([A, B], clock)
    assert fail(servers) == A
    assert served(servers, 1) == [B]
    clock.now = FIRST_PAUSE_S
    assert fail(servers, Outcome.UNKNOWN) == A
    assert A in served(servers, 2)


def test_an_overloaded_server_is_left_out_briefly(clock):
    """A full queue is refused at once, so that the server looks idle: it is left out, but its pause does not grow."""
    servers = Servers([A, B], clock)
    for _ in range(5):
        assert fail(servers, Outcome.OVERLOADED) == A
        assert served(servers, 2) == [B] * 2
        clock.now += FIRST_PAUSE_S


def test_where_all_fail_the_one_that_failed_least_is_asked(clock):
    """A is dead and B and C are overloaded: their queues have room sooner than A comes back."""
    servers = Servers([A, B, C], clock)
    assert fail(servers) == A
    assert served(servers, 2) == [B, C]
    clock.now = FIRST_PAUSE_S
    assert fail(servers) == A
    for _ in range(2):
        fail(servers, Outcome.OVERLOADED)
    assert servers.all_failed()
    assert [fail(servers, Outcome.OVERLOADED) for _ in range(4)] in ([B, C, B, C], [C, B, C, B])


def test_where_all_fail_requests_are_still_spread(clock):
    """A failed once more than B and C, so that each of those has one request more in flight, and not all of them."""
    servers = Servers([A, B, C], clock)
    assert fail(servers) == A
    assert served(servers, 2) == [B, C]
    clock.now = FIRST_PAUSE_S
    for _ in range(3):
        fail(servers)
    assert servers.all_failed()
    assert Counter(servers.choose().server for _ in range(11)) == {A: 3, B: 4, C: 4}


def test_a_retry_goes_to_a_server_that_was_not_tried(clock):
    """Only if every other server is left out, the request returns to one at which it failed."""
    servers = Servers([A, B], clock)
    assert servers.has_other([A])
    assert servers.choose([A]).server == B
    assert servers.choose([A]).server == B
    assert not servers.has_other([A, B])
    assert servers.choose([A, B]).server == A


def test_a_server_that_is_gone_drains(clock):
    """It gets no new request, its request in flight ends, and only then it is reported, once, to be closed."""
    servers = Servers([A, B], clock)
    turn = servers.choose()
    servers.replace([B, C])
    assert servers.members() == [B, C]
    assert A not in served(servers, 5)
    assert servers.drained() == []
    servers.release(turn, Outcome.ANSWERED)
    assert servers.drained() == [A]
    assert servers.drained() == []


def test_a_server_that_stays_or_comes_back_keeps_its_state(clock):
    """A look-up with the same result brings no failed server back; nor does one that lost and found it again."""
    servers = Servers([A, B], clock)
    held = servers.choose()
    servers.release(servers.choose([A]), Outcome.FAILED)
    servers.replace([A])
    servers.replace([B, A])
    assert servers.choose().server == A
    servers.release(held, Outcome.ANSWERED)
    assert servers.drained() == []


# --- against a model


@dataclass
class Known:
    """The model's view of a server: all that happened to it, from which everything else is computed."""

    events: list[tuple[str, float]] = field(default_factory=list)
    """``failed`` or ``overloaded`` with the end of its pause, or ``back``."""
    chosen_at: int = 0

    def failures(self) -> int:
        """Return the failures since the server was back; an overload counts as the first one."""
        count = 0
        for kind, _ in self.events:
            count = {"back": 0, "overloaded": 1, "failed": count + 1}[kind]
        return count


class Choosing(RuleBasedStateMachine):
    """Requests, outcomes, time and look-ups in any order, with at most four servers."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.servers = Servers([A, B], self.clock)
        self.model = {A: Known(), B: Known()}
        self.members = [A, B]
        self.open: list[tuple[Turn, int]] = []
        """Requests in flight, each with the number of events of its server when it was sent."""
        self.trials: list[Turn] = []
        """Requests in flight that try a server which is left out."""
        self.count = 0

    def in_flight(self, server: Server) -> int:
        return sum(turn.server == server for turn, _ in self.open)

    def is_ready(self, server: Server) -> bool:
        known = self.model[server]
        if not known.failures():
            return True
        return self.clock.now >= known.events[-1][1] and not any(turn.server == server for turn in self.trials)

    @rule(tried=st.sets(st.sampled_from([A, B, C])))
    def send(self, tried: set[Server]) -> None:
        pool = [server for server in self.members if self.is_ready(server)]
        everyone_left_out = not pool
        pool = pool or self.members
        pool = [server for server in pool if server not in tried] or pool
        load = {server: self.in_flight(server) for server in pool}
        if everyone_left_out:
            load = {server: number + self.model[server].failures() for server, number in load.items()}
        pool = [server for server in pool if load[server] == min(load.values())]
        first = min(self.model[server].chosen_at for server in pool)
        turn = self.servers.choose(tried)
        assert turn.server in [server for server in pool if self.model[server].chosen_at == first]
        self.count += 1
        known = self.model[turn.server]
        known.chosen_at = self.count
        self.open.append((turn, len(known.events)))
        if known.failures():
            self.trials.append(turn)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), outcome=st.sampled_from(Outcome))
    def end(self, data: st.DataObject, outcome: Outcome) -> None:
        place = data.draw(st.integers(0, len(self.open) - 1))
        turn, events = self.open.pop(place)
        self.servers.release(turn, outcome)
        known = self.model.get(turn.server)
        assert known is not None, "a server is known while it has requests in flight"
        if events != len(known.events):
            return
        self.trials = [trial for trial in self.trials if trial.server != turn.server]
        if outcome is Outcome.FAILED:
            pause = min(FIRST_PAUSE_S * 2 ** known.failures(), LONGEST_PAUSE_S)
            known.events.append(("failed", self.clock.now + pause))
        elif outcome is Outcome.OVERLOADED:
            known.events.append(("overloaded", self.clock.now + FIRST_PAUSE_S))
        elif outcome is Outcome.ANSWERED and known.failures():
            known.events.append(("back", 0.0))

    @rule(seconds=st.sampled_from([0.1, FIRST_PAUSE_S, 5.0, LONGEST_PAUSE_S]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(members=st.lists(st.sampled_from([A, B, C]), min_size=1, unique=True))
    def look_up(self, members: list[Server]) -> None:
        gone = set(self.model) - set(members)
        self.servers.replace(members)
        self.members = members
        self.model |= {server: Known() for server in members if server not in self.model}
        idle = {server for server in gone if not self.in_flight(server)}
        assert set(self.servers.drained()) == idle
        for server in idle:
            del self.model[server]

    @invariant()
    def who_is_left_out_is_known(self) -> None:
        left_out = [bool(self.model[server].failures()) for server in self.members]
        assert self.servers.members() == self.members
        assert self.servers.some_failed() == any(left_out)
        assert self.servers.all_failed() == all(left_out)
        for tried in ([], [A], [A, B], [C]):
            others = [server for server in self.members if server not in tried]
            assert self.servers.has_other(tried) == any(map(self.is_ready, others))


Choosing.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_any_order_of_events_agrees_with_the_model = Choosing.TestCase
