"""Measures what the HTTP gateway adds to a request, relative to the gRPC client.

    python -m benchmarks.gateway --artifacts DIR --repository DIR

The benchmark starts the real server and `llamarec gateway` in a process of its own. One caller sends the same histories
to `llamarec_retrieval`, in turn with the gRPC client and over HTTP on one open connection, so that a slow phase of the
machine affects both. Callers of the gateway are not Python, so the HTTP caller is the standard library's, without the
cost of a client library.
"""

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from llamarec_client import RecommenderClient
from llamarec_client.contract import RETRIEVAL_ENSEMBLE
from preprocessing.data import load_data
from serving.server.local import LocalServer

CEILING_MS = 3.0
"""Most milliseconds that the median request over the gateway may take beyond that over gRPC."""
WARM_UP = 20
"""Requests of each kind before the first measurement."""


@contextmanager
def running_gateway(server: str) -> Iterator[int]:
    """Yield the port of a gateway in a process of its own, in front of a server."""
    command = [sys.executable, "-m", "llamarec.cli", "gateway", "--port", "0", "--servers", server]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        if not line.startswith("gateway: "):
            raise RuntimeError(f"the gateway did not start: {line}{process.stderr.read()}")
        yield int(line.strip().rpartition(":")[2])
    finally:
        process.terminate()
        process.wait()


def over_grpc(client: RecommenderClient, history: list[str]) -> tuple[float, list[str]]:
    """Return the milliseconds of one request over gRPC, and the recommended items."""
    began = time.perf_counter()
    answer = client.recommend(history, model=RETRIEVAL_ENSEMBLE)
    return 1e3 * (time.perf_counter() - began), [row.item_id for row in answer]


def over_http(connection: http.client.HTTPConnection, history: list[str]) -> tuple[float, list[str]]:
    """Return the milliseconds of one request over the gateway, and the recommended items."""
    began = time.perf_counter()
    body = json.dumps({"history": history, "model": RETRIEVAL_ENSEMBLE})
    connection.request("POST", "/v1/recommend", body, {"Content-Type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    return 1e3 * (time.perf_counter() - began), [row["item_id"] for row in answer["items"]]


def one_round(
    client: RecommenderClient, connection: http.client.HTTPConnection, histories: list[list[str]]
) -> dict[str, float]:
    """Return the median milliseconds of both ways, whose answers have to be equal.

    Raises:
        RuntimeError: the gateway returned other items than the server.
    """
    times: dict[str, list[float]] = {"grpc": [], "gateway": []}
    for history in histories:
        grpc_ms, expected = over_grpc(client, history)
        http_ms, items = over_http(connection, history)
        if items != expected:
            raise RuntimeError(f"the gateway returned {items}, and the server {expected}")
        times["grpc"].append(grpc_ms)
        times["gateway"].append(http_ms)
    medians = {way: statistics.median(each) for way, each in times.items()}
    return {**medians, "added": medians["gateway"] - medians["grpc"]}


def benchmark(artifacts: Path, repository: Path, users: int, rounds: int) -> dict[str, Any]:
    """Return the medians of each round and of all of them, and whether the ceiling is kept."""
    data = load_data(artifacts)
    histories = [data.raw_history(int(user)) for user in np.random.default_rng(0).permutation(len(data.users))[:users]]
    with LocalServer(repository) as server, running_gateway(server.url) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        with RecommenderClient(server.url) as client:
            one_round(client, connection, histories[:WARM_UP])
            measured = [one_round(client, connection, histories) for _ in range(rounds)]
        connection.close()
    medians = {name: statistics.median(each[name] for each in measured) for name in measured[0]}
    return {"users": users, "rounds": measured, "median_ms": medians, "floor_met": medians["added"] <= CEILING_MS}


def main() -> None:
    """Parse the command line and print the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts/movielens-100k"))
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--users", type=int, default=200, help="Users whose histories are sent in each round.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="Print JSON instead of lines.")
    options = parser.parse_args()
    result = benchmark(options.artifacts, options.repository, options.users, options.rounds)
    if options.json:
        print(json.dumps(result))
        return
    for row in result["rounds"]:
        print(", ".join(f"{name} {value:.2f} ms" for name, value in row.items()))
    print("median: " + ", ".join(f"{name} {value:.2f} ms" for name, value in result["median_ms"].items()))
    print(f"at most {CEILING_MS:g} ms more: {result['floor_met']}")


if __name__ == "__main__":
    main()
