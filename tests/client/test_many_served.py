"""One client of three real servers on the loopback interface, whose steps only echo: shares, faults and contracts."""

import asyncio
import os
import shutil
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from tritonclient import grpc

from llamarec_client import AsyncRecommenderClient, RecommenderClient, Request
from llamarec_client.contract import ENSEMBLE, EVENTS, ITEMS
from llamarec_client.errors import ClientError, InvalidRequest, ServerUnavailable
from serving.server.local import LocalServer

PASS_S = 0.05
"""Time of a request in the ranker, which takes one after another: so all servers are equally fast."""


@pytest.fixture(scope="module")
def slow_repository(echo_repository, tmp_path_factory) -> Path:
    """Copy the repository with a ranker that takes PASS_S for each request, and without the models of the store."""
    repository = tmp_path_factory.mktemp("slow") / "repository"
    shutil.copytree(echo_repository, repository, ignore=shutil.ignore_patterns(EVENTS, ITEMS))
    model = repository / "ranker" / "1" / "model.py"
    model.write_text(model.read_text().replace("cut = slice", f"time.sleep({PASS_S})\n        cut = slice"))
    return repository


@contextmanager
def running(repository: Path, number: int) -> Iterator[list[LocalServer]]:
    """Run servers of one repository, which start at the same time."""
    servers = [LocalServer(repository) for _ in range(number)]
    # A server ends with the thread that started it, and these threads live as long as the pool.
    with ThreadPoolExecutor(number) as pool:
        try:
            yield list(pool.map(LocalServer.__enter__, servers))
        finally:
            list(pool.map(lambda server: server.__exit__(None, None, None), servers))


@pytest.fixture(scope="module")
def three(slow_repository) -> Iterator[list[LocalServer]]:
    with running(slow_repository, 3) as servers:
        yield servers


def answers(server: LocalServer) -> int:
    """Return the requests that a server has answered."""
    with grpc.InferenceServerClient(server.url) as client:
        return int(client.get_inference_statistics(ENSEMBLE).model_stats[0].inference_count)


@pytest.mark.thorough
def test_the_load_is_spread_evenly(three):
    """60 requests, six at a time, from either client: each server answers its third, give or take a fifth of it.

    Throughput is measured by ``benchmarks/many_servers.py``.
    """
    urls = [server.url for server in three]
    requests = [Request([chr(97 + number % 26)]) for number in range(60)]

    async def in_loop() -> list[list | ClientError]:
        async with AsyncRecommenderClient(urls) as client:
            return await client.recommend_many(requests, in_flight=6)

    def plain() -> list[list | ClientError]:
        with RecommenderClient(urls) as client:
            return client.recommend_many(requests, in_flight=6)

    for send in (plain, lambda: asyncio.run(in_loop())):
        before = [answers(server) for server in three]
        results = send()
        assert [[row.item_id for row in result] for result in results] == [request.history for request in requests]
        shares = [answers(server) - earlier for server, earlier in zip(three, before, strict=True)]
        assert sum(shares) == 60
        assert all(16 <= share <= 24 for share in shares), shares


@pytest.mark.thorough
def test_no_request_fails_when_one_server_is_killed_and_one_drains(slow_repository):
    """Each of two clients, one of either kind, has six requests in flight all the time. One of three servers gets
    SIGKILL and another one SIGTERM: what was in flight at the first is sent again to another, which the budget of ten
    retries allows, and the second finishes its own or has them sent elsewhere. Both clients go on with the third.
    """
    outcomes: list[object] = []
    ended = threading.Event()

    async def ask(recommend: Callable[[list[str]], Awaitable[list]]) -> None:
        while not ended.is_set():
            try:
                outcomes.append([row.item_id for row in await recommend(["a", "b"])])
            except ClientError as error:
                outcomes.append(error)

    async def load(urls: list[str]) -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(6))
        with RecommenderClient(urls) as plain:
            async with AsyncRecommenderClient(urls) as client:
                in_thread = lambda history: asyncio.to_thread(plain.recommend, history)  # noqa: E731
                await asyncio.gather(*(ask(recommend) for recommend in (client.recommend, in_thread) for _ in range(6)))

    with running(slow_repository, 3) as servers:
        sending = threading.Thread(target=lambda: asyncio.run(load([server.url for server in servers])))
        sending.start()
        try:
            time.sleep(1)
            os.kill(servers[0].pid, signal.SIGKILL)
            time.sleep(1.5)
            os.kill(servers[1].pid, signal.SIGTERM)
            time.sleep(2)
            sent = len(outcomes)
            time.sleep(1)
        finally:
            ended.set()
            sending.join()
    assert [outcome for outcome in outcomes if outcome != ["b", "a"]] == []
    assert len(outcomes) - sent > 5, "the third server alone answers 20 a second"


@pytest.mark.thorough
def test_a_real_server_with_another_contract_is_refused(three, slow_repository, tmp_path):
    """An ensemble without RETRIEVER_RANK: Triton refuses the request, which asks for it, before any step sees it.

    The other servers answer, and a client of that server alone gets the server's own words.
    """
    repository = shutil.copytree(slow_repository, tmp_path / "repository")
    config = repository / ENSEMBLE / "config.pbtxt"
    text = config.read_text().replace("RETRIEVER_RANK", "RANK")
    config.write_text(text.replace('key: "RANK"', 'key: "RETRIEVER_RANK"'))  # the ranker's name of it
    with running(repository, 1) as (other,):
        with RecommenderClient([other.url, three[0].url]) as client:
            assert all(len(client.recommend(["a"])) == 1 for _ in range(6))
        same = f"localhost:{other.url.rpartition(':')[2]}"
        named = rf"none of the servers {other.url}, {same} can answer; .* serves llamarec with another contract"
        with RecommenderClient([other.url, same]) as client, pytest.raises(ServerUnavailable, match=named):
            client.recommend(["a"])
        with RecommenderClient(other.url) as client, pytest.raises(InvalidRequest, match="RETRIEVER_RANK"):
            client.recommend(["a"])
