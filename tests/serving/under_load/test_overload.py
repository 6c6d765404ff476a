"""Overload of the ranker: accepted requests are answered in time, and the others are refused at once."""

import asyncio
import json
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
from echo import write_echo
from supervised import ask, contention, inputs_of, wait_for
from tritonclient import grpc
from tritonclient.grpc import aio
from tritonclient.utils import InferenceServerException

from export.config import Serving, write_configs
from llamarec_client.contract import ENSEMBLE, RETRIEVAL_ENSEMBLE
from llamarec_client.errors import ClientError
from llamarec_client.recommender import AsyncRecommenderClient, Request
from serving.server.local import LocalServer

PASS_SECONDS = 0.1
QUEUE_SECONDS = 1.0
SUSTAINABLE = 1 / PASS_SECONDS
"""Requests per second that one ranker of this speed can answer."""
SLOW_RANKER = """
    def answer(self, request):
        time.sleep({seconds})
        with open({counted!r}, "a") as file:
            file.write("pass\\n")
        return {{ITEM_ID: request[CANDIDATE_ID], SCORE: request[CANDIDATE_SCORE],
                 RETRIEVER_RANK: request[CANDIDATE_RANK]}}
"""


@pytest.fixture(scope="module")
def passes(tmp_path_factory) -> Path:
    """Return a file to which the ranker adds a line for each pass."""
    path = tmp_path_factory.mktemp("passes") / "passes"
    path.touch()
    return path


@pytest.fixture(scope="module")
def slow_server(passes, tmp_path_factory):
    """Start the echo steps with a ranker that takes 0.1 s, and the queue that ``write_configs`` derives from that."""
    repository = tmp_path_factory.mktemp("slow")
    write_configs(repository, Serving(pass_seconds=PASS_SECONDS, queue_seconds=QUEUE_SECONDS))
    write_echo(repository, ranker=SLOW_RANKER.format(seconds=PASS_SECONDS, counted=str(passes)))
    with LocalServer(repository) as server:
        yield server


async def asked(client, results, model=ENSEMBLE):
    """Send one request and append (seconds, error) to ``results``; the error is empty if it was answered."""
    began = time.monotonic()
    try:
        await client.infer(model, inputs_of(["a", "b"]), client_timeout=30)
        results.append((time.monotonic() - began, ""))
    except InferenceServerException as error:
        results.append((time.monotonic() - began, str(error)))


async def storm(url, rate, seconds, retrieval_rate):
    """Send requests in an open loop, in which each request starts on schedule, without waiting for earlier ones."""
    ranked, retrieved, began = [], [], time.monotonic()
    async with aio.InferenceServerClient(url) as client:
        tasks = []
        while (now := time.monotonic() - began) < seconds:
            while len(tasks) < now * (rate + retrieval_rate):
                every = round(1 + rate / retrieval_rate)
                if len(tasks) % every:
                    tasks.append(asyncio.create_task(asked(client, ranked)))
                else:
                    tasks.append(asyncio.create_task(asked(client, retrieved, RETRIEVAL_ENSEMBLE)))
            await asyncio.sleep(0.002)
        await asyncio.gather(*tasks)
    return ranked, retrieved, time.monotonic() - began


def p99(seconds):
    return float(np.quantile(seconds, 0.99))


@pytest.mark.smoke
def test_a_storm_of_ten_times_what_can_be_ranked(slow_server):
    """Ten times the sustainable rate for 8 s delays no accepted request beyond the queue timeout plus two passes.

    The other requests get UNAVAILABLE in less than the time of one pass, and retrieval answers within 50 ms. 5 s after
    the storm a single request takes as long as before it, up to one pass.
    """

    def single():
        began = time.monotonic()
        ask(slow_server.url, ["a", "b"])
        return time.monotonic() - began

    calm = statistics.median(single() for _ in range(5))
    ranked, retrieved, lasted = asyncio.run(storm(slow_server.url, 10 * SUSTAINABLE, 8, 10))
    time.sleep(5)
    after = statistics.median(single() for _ in range(5))
    accepted = [seconds for seconds, error in ranked if not error]
    refused = [(seconds, error) for seconds, error in ranked if error]
    figures = {
        "accepted": len(accepted),
        "accepted_p99": p99(accepted),
        "refused": len(refused),
        "refused_late": sum("queue timeout" in error for _, error in refused),
        "refused_p99": p99([seconds for seconds, _ in refused]),
        "retrieval_p99": p99([seconds for seconds, _ in retrieved]),
        "before": calm,
        "after": after,
        "contention": contention(),
    }
    print(json.dumps(figures))  # shown by `pytest -s`, for docs/results/serving.md
    bound = QUEUE_SECONDS + 2 * PASS_SECONDS * contention()
    assert len(ranked) > 300
    assert 0.7 * 8 * SUSTAINABLE / contention() < len(accepted) <= lasted * SUSTAINABLE + 1
    assert p99(accepted) < bound
    assert all("StatusCode.UNAVAILABLE" in error for _, error in refused)
    assert p99([seconds for seconds, _ in refused]) < PASS_SECONDS * contention()
    assert not [error for _, error in retrieved if error]
    assert p99([seconds for seconds, _ in retrieved]) < 0.05 * contention()
    assert after < calm + PASS_SECONDS * contention()


def count(path):
    return len(path.read_text().splitlines())


def test_requests_given_up_cost_no_pass(slow_server, passes):
    """Of eight requests with a deadline of 0.35 s, those whose pass has not started by then are never ranked."""
    before = count(passes)

    async def give_up():
        async with AsyncRecommenderClient(slow_server.url) as client:
            return await client.recommend_many([Request(["a"])] * 8, timeout=0.35)

    late = sum(isinstance(result, ClientError) for result in asyncio.run(give_up()))
    ask(slow_server.url, ["a"])  # answered after everything that is left in the queue
    assert late >= 4, "four passes take longer than the deadline"
    # A pass may also have ended so shortly before the deadline that its answer came too late.
    assert count(passes) - before <= 8 - late + 3, "the answered, two around the deadline, and the last one"


def test_no_pause_between_passes(slow_server):
    """Eight concurrent requests are ranked without pauses, so the last one is answered after eight passes of 0.1 s.

    Under one of Triton's queue policies, its batcher would sleep up to half a second before each pass.
    """

    async def burst():
        results = []
        async with aio.InferenceServerClient(slow_server.url) as client:
            await client.is_server_live()
            await asyncio.gather(*(asked(client, results) for _ in range(8)))
        return results

    seconds = sorted(seconds for seconds, _ in asyncio.run(burst()))
    assert seconds[-1] < 8 * PASS_SECONDS + 0.2 * contention()


def test_a_caller_may_shorten_the_wait(slow_server):
    """A request with a timeout of 0.2 s gets UNAVAILABLE from the queue, instead of an answer after 0.6 s."""
    tensor = grpc.InferInput("HISTORY", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[b"a"]], dtype=object))
    errors = []

    def done(result, error):
        errors.append(error)

    with grpc.InferenceServerClient(slow_server.url) as client:
        for _ in range(6):
            client.async_infer("llamarec", [tensor], done, timeout=200_000)
        assert wait_for(lambda: len(errors) == 6, 10)
    refused = [error for error in errors if error is not None]
    assert refused
    assert all(isinstance(error, InferenceServerException) for error in refused)
    assert {error.status() for error in refused} == {"StatusCode.UNAVAILABLE"}
