"""Retries, fallback and deadlines against a gRPC server with scripted answers, so that attempts can be counted."""

import asyncio
import time
from collections.abc import Iterator

import grpc
import pytest
from scripted import GOOD, Scripted, serve

from llamarec_client.contract import DEGRADED_REASONS, ENSEMBLE, RETRIEVAL_ENSEMBLE
from llamarec_client.errors import (
    ClientError,
    InvalidRequest,
    Overloaded,
    RequestTimeout,
    ServerError,
    ServerUnavailable,
    StepDied,
)
from llamarec_client.recommender import AsyncRecommenderClient, RecommenderClient, Request
from llamarec_client.retries import MAX_ATTEMPTS, RETRY_BURST, RetryBudget

UNAVAILABLE = (grpc.StatusCode.UNAVAILABLE, "starting")
FULL = (grpc.StatusCode.UNAVAILABLE, "in ensemble 'llamarec', prompt_builder: queue full: 8 wait for the ranker")
DEAD = (
    grpc.StatusCode.INTERNAL,
    "in ensemble 'llamarec', Failed to process the request(s) for model instance 'ranker_0_0', message: "
    "Stub process 'ranker_0_0' is not healthy.",
)
"""Status and message as tritonserver 2.51 returns them."""
MISSED = (
    grpc.StatusCode.UNAVAILABLE,
    "in ensemble 'llamarec', prompt_builder: step ranker is dead: `llamarec serve` restarts",
)
"""The same of the step before it, which saw that it is dead."""


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Scripted, str]]:
    with serve() as scripted_server:
        yield scripted_server


@pytest.fixture(params=["plain", "asyncio"])
def ask(request, running):
    """Return ``ask(history, ...)``, which uses a new client of either kind and therefore a full retry budget."""
    _, url = running

    async def in_loop(history, **options):
        async with AsyncRecommenderClient(url) as client:
            return await client.recommend(history, **options)

    def plain(history, **options):
        with RecommenderClient(url) as client:
            return client.recommend(history, **options)

    return plain if request.param == "plain" else lambda *given, **options: asyncio.run(in_loop(*given, **options))


def test_an_unavailable_server_is_asked_again(running, ask):
    """A call that is refused twice and answered the third time returns one answer after three requests."""
    scripted, _ = running
    scripted.says(llamarec=[UNAVAILABLE, UNAVAILABLE, GOOD])
    answer = ask(["a"])
    assert [row.item_id for row in answer] == ["a"]
    assert not answer.degraded
    assert len(scripted.asked) == 3


def test_attempts_end(running, ask):
    """A server that stays unavailable gets three requests; then the call raises its error."""
    scripted, _ = running
    scripted.says(llamarec=[UNAVAILABLE])
    with pytest.raises(ServerUnavailable, match="starting"):
        ask(["a"])
    assert len(scripted.asked) == MAX_ATTEMPTS


@pytest.mark.parametrize("status", [DEAD, MISSED])
def test_a_dead_step_is_asked_once_more(running, ask, status):
    """A dead step is retried once, because another instance may be alive; then the error names the step."""
    scripted, _ = running
    scripted.says(llamarec=[status])
    with pytest.raises(StepDied, match=r"the process of step ranker .*is dead"):
        ask(["a"])
    assert len(scripted.asked) == 2


@pytest.mark.parametrize(
    ("status", "raised"),
    [
        ((grpc.StatusCode.INVALID_ARGUMENT, "features: TOP_K is 0"), InvalidRequest),
        ((grpc.StatusCode.INTERNAL, "ranker: ValueError: x"), ServerError),
        ((grpc.StatusCode.RESOURCE_EXHAUSTED, "too large"), ServerError),
    ],
)
def test_what_would_fail_again_is_not_sent_again(running, ask, status, raised):
    """Only UNAVAILABLE and a dead step are retried."""
    scripted, _ = running
    scripted.says(llamarec=[status])
    with pytest.raises(raised):
        ask(["a"])
    assert len(scripted.asked) == 1


@pytest.mark.parametrize(
    ("status", "ranker_asked", "reason"),
    [
        (FULL, 1, "Overloaded"),
        (DEAD, 2, "StepDied"),
        (MISSED, 2, "StepDied"),
        ((grpc.StatusCode.INTERNAL, "ranker: x"), 1, "ServerError"),
    ],
)
def test_the_retriever_answers_when_the_ranker_does_not(running, ask, status, ranker_asked, reason):
    """With ``fallback`` the retrieval ensemble gives an answer that is marked degraded, and its request carries the
    reason. A full queue is not retried before the fallback.
    """
    scripted, _ = running
    scripted.says(llamarec=[status], llamarec_retrieval=[GOOD])
    answer = ask(["a"], fallback="retriever")
    assert answer.degraded
    assert answer.model == RETRIEVAL_ENSEMBLE
    assert scripted.asked == [ENSEMBLE] * ranker_asked + [RETRIEVAL_ENSEMBLE]
    assert scripted.reasons == [""] * ranker_asked + [reason]
    assert reason in DEGRADED_REASONS


@pytest.mark.parametrize("ids", [{}, {"candidates": []}])
def test_texts_without_ids_have_no_fallback(running, ask, ids):
    """The retriever knows none of them, so the ranker's error comes back. Titles of ids fall back as ids alone do."""
    scripted, _ = running
    scripted.says(llamarec=[FULL], llamarec_retrieval=[GOOD])
    with pytest.raises(Overloaded):
        ask([], candidate_titles=["One", "Two"], fallback="retriever", **ids)
    assert set(scripted.asked) == {ENSEMBLE}
    assert ask(["a"], candidates=["b"], candidate_titles=["B"], fallback="retriever").degraded


def test_a_slow_ranker_leaves_time_for_the_retriever(running, ask):
    """One deadline covers both models: the ranker is abandoned when a tenth of it is left for the retriever."""
    scripted, _ = running
    scripted.says(llamarec=[3.0], llamarec_retrieval=[GOOD])
    start = time.monotonic()
    assert ask(["a"], fallback="retriever", timeout=1.0).degraded
    assert time.monotonic() - start < 1.5  # the deadline and the client's own start


def test_bad_input_has_no_fallback(running, ask):
    """An invalid request has no fallback, because the retriever would refuse it too."""
    scripted, _ = running
    scripted.says(llamarec=[(grpc.StatusCode.INVALID_ARGUMENT, "features: TOP_K is 0")])
    with pytest.raises(InvalidRequest):
        ask(["a"], fallback="retriever")
    assert scripted.asked == [ENSEMBLE]


def test_a_full_queue_without_fallback_is_overloaded(running, ask):
    """The error is Overloaded, a kind of ServerUnavailable, and carries the request id that the server logged."""
    scripted, _ = running
    scripted.says(llamarec=[FULL])
    with pytest.raises(Overloaded, match="retry later") as raised:
        ask(["a"], request_id="r-1")
    assert raised.value.request_id == "r-1"


def test_retries_never_amplify_an_outage(running):
    """200 calls to a server that refuses all of them add at most 10 % more requests, plus the burst of the budget."""
    scripted, url = running
    scripted.says(llamarec=[UNAVAILABLE])
    with RecommenderClient(url) as client:
        answers = client.recommend_many([Request(["a"])] * 200)
    assert all(isinstance(answer, ServerUnavailable) for answer in answers)
    assert len(scripted.asked) <= 200 + 0.1 * 200 + RETRY_BURST
    assert len(scripted.asked) > 200


def test_the_budget_earns_a_tenth_a_request():
    """The budget starts with ten retries, and then grants one retry for every ten requests."""
    budget = RetryBudget()
    assert sum(budget.spend() for _ in range(50)) == RETRY_BURST
    granted = 0
    for _ in range(1000):
        budget.earn()
        granted += budget.spend()
    assert granted == pytest.approx(100, abs=1)


def test_the_deadline_covers_the_retries(running, ask):
    """Each attempt takes 0.4 s and fails: with a deadline of 0.6 s the call ends before a third attempt."""
    scripted, _ = running
    scripted.says(llamarec=[0.4])
    scripted.script = lambda model, place: time.sleep(0.4) or UNAVAILABLE
    start = time.monotonic()
    with pytest.raises(ClientError):
        ask(["a"], timeout=0.6)
    assert time.monotonic() - start < 1.1
    assert len(scripted.asked) <= 2


def test_many_users_in_order_with_errors_of_their_own(running):
    """Both clients return the answers in the order of the requests, and a bad request does not affect the others."""
    scripted, url = running
    scripted.says(llamarec=[GOOD])
    requests = [Request([chr(97 + n % 26)]) if n % 7 else Request("no list") for n in range(100)]

    async def in_loop():
        async with AsyncRecommenderClient(url) as client:
            return await client.recommend_many(requests)

    with RecommenderClient(url) as client:
        plain = client.recommend_many(requests)
    for answers in (plain, asyncio.run(in_loop())):
        for n, answer in enumerate(answers):
            if n % 7:
                assert [row.item_id for row in answer] == [chr(97 + n % 26)]
            else:
                assert isinstance(answer, InvalidRequest)


@pytest.mark.parametrize("options", [{"timeout": 0}, {"timeout": -1}, {"fallback": "none"}])
def test_options_that_mean_nothing_are_refused(running, ask, options):
    """Invalid options raise an error that names the option, before any request is sent."""
    scripted, _ = running
    scripted.says(llamarec=[GOOD])
    with pytest.raises(InvalidRequest, match=next(iter(options))):
        ask(["a"], **options)
    assert not scripted.asked


def test_a_deadline_that_passes_is_a_timeout(running, ask):
    """Without a fallback, a call whose deadline passes raises RequestTimeout."""
    scripted, _ = running
    scripted.says(llamarec=[1.0])
    with pytest.raises(RequestTimeout, match=r"within 0.3 s"):
        ask(["a"], timeout=0.3)
