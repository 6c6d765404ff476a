"""Measures how much more a client gets from several servers than from one.

    python -m benchmarks.many_servers --repository DIR

Each server is a real tritonserver on a copy of the repository, with a ranker that takes 0.1 s for a request
(:data:`SLOW_RANKER`) and uses no processor time, so that the servers do not compete for the cores of this machine. One
client sends the same number of concurrent requests to one server, and then to all of them.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.serving_overhead import without_ranker
from llamarec_client import ClientError, RecommenderClient, Request
from serving.server.local import LocalServer

RATIO_FLOOR = 2.5
"""Minimum throughput of three servers, relative to one."""
SLOW_RANKER = '''
"""A ranker that keeps the candidates' order and takes 0.1 s, during which it sleeps."""

import time

from llamarec_client.contract import ITEM_ID, RETRIEVER_RANK, SCORE
from serving.contract import CANDIDATE_ID, CANDIDATE_RANK, CANDIDATE_SCORE
from serving.steps.worker import Worker


class TritonPythonModel:
    def initialize(self, args):
        self.worker = Worker("ranker", self)

    def execute(self, requests):
        return self.worker.execute(requests)

    def answer(self, request):
        time.sleep(0.1)
        columns = (request[spec] for spec in (CANDIDATE_ID, CANDIDATE_SCORE, CANDIDATE_RANK))
        return dict(zip((ITEM_ID, SCORE, RETRIEVER_RANK), columns))
'''
REQUEST = Request(["a", "b"])
"""Unknown items of a history are skipped, so any repository answers this."""


def rate(urls: Sequence[str], requests: int, in_flight: int) -> float:
    """Return the requests per second that one client gets from servers.

    Raises:
        ClientError: a request failed.
    """
    with RecommenderClient(urls) as client:
        client.recommend_many([REQUEST] * 2 * len(urls), in_flight=len(urls))
        began = time.perf_counter()
        results = client.recommend_many([REQUEST] * requests, in_flight=in_flight)
        seconds = time.perf_counter() - began
    for result in results:
        if isinstance(result, ClientError):
            raise result
    return requests / seconds


def benchmark(repository: Path, servers: int, requests: int, in_flight: int) -> dict[str, Any]:
    """Return the throughput of one server and of several, and whether the floor is met."""
    with ExitStack() as open_:
        folder = Path(open_.enter_context(tempfile.TemporaryDirectory())) / "repository"
        version = without_ranker(repository, folder)
        version.mkdir()
        (version / "model.py").write_text(SLOW_RANKER, encoding="utf-8")
        urls = [open_.enter_context(LocalServer(folder)).url for _ in range(servers)]
        one = rate(urls[:1], requests, in_flight)
        several = rate(urls, servers * requests, in_flight)
    ratio = several / one
    return {
        "servers": servers,
        "in_flight": in_flight,
        "requests_a_second": {"one server": one, "all servers": several},
        "ratio": ratio,
        "floor_met": ratio >= RATIO_FLOOR * servers / 3,
    }


def main() -> None:
    """Parse the command line and print the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--servers", type=int, default=3, help="Number of servers.")
    parser.add_argument("--requests", type=int, default=60, help="Requests for each server.")
    parser.add_argument("--in-flight", type=int, default=6, help="Concurrent requests.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of lines.")
    options = parser.parse_args()
    result = benchmark(options.repository, options.servers, options.requests, options.in_flight)
    if options.json:
        print(json.dumps(result))
        return
    for name, value in result["requests_a_second"].items():
        print(f"{name}: {value:.1f} requests/s")
    print(f"ratio: {result['ratio']:.2f}; floor met: {result['floor_met']}")


if __name__ == "__main__":
    main()
