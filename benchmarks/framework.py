"""Compares what the framework costs a request with that of another checkout, side by side.

    git worktree add /tmp/before COMMIT
    python -m benchmarks.framework --artifacts DIR --repository DIR --against /tmp/before

Each checkout serves the same exported files with its own code and configurations, with a ranker that has no model
(:mod:`benchmarks.framework_side`): the time of a request is that of everything but the ranker's computation. A third
server runs as many empty steps, the least that an ensemble of the Python backend costs. The servers take turns, each
for a few hundred requests at a time, so that a slow phase of the machine affects all of them; medians of the rounds are
reported. The requests are built beforehand, and answers are not parsed, so that the client takes little of the
processors. Both checkouts' answers are compared bit by bit first.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2
from tritonclient.utils import serialize_byte_tensor

from llamarec_client.contract import ENSEMBLE
from preprocessing.data import load_data

CHECKOUT = Path(__file__).resolve().parents[1]
SIDE = Path(__file__).with_name("framework_side.py")
METHOD = "/inference.GRPCInferenceService/ModelInfer"
LATENCY_CEILING = 0.7
"""Most of the other checkout's median latency at concurrency 1."""
RATE_FLOOR = 2.0
"""Least requests a second with 32 in flight, relative to the other checkout."""
TAIL_CEILING = 4.0
"""Most that the 99th percentile may be of the median, at any higher concurrency."""
WARM_UP = 200
"""Requests to each server before the first measurement."""


@contextmanager
def serving(checkout: Path, repository: Path, kind: str) -> Iterator[str]:
    """Yield the address of a server that runs a checkout's code; ``kind`` is ``constant`` or ``empty``.

    Raises:
        RuntimeError: the server did not start; the reason is on standard error.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(checkout / "client"), str(checkout)))}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", str(SIDE), str(repository.resolve()), f"{folder}/models", kind]
        with subprocess.Popen(
            command, cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                url = process.stdout.readline().strip()
                if not url:
                    raise RuntimeError(f"the server of {checkout} did not start")
                yield url
            finally:
                process.stdin.close()


def request_of(history: Sequence[str]) -> bytes:
    """Return the message of a request."""
    texts = np.array([item.encode() for item in history], dtype=object)
    request = service_pb2.ModelInferRequest(model_name=ENSEMBLE)
    request.inputs.add(name="HISTORY", datatype="BYTES", shape=[1, len(history)])
    request.raw_input_contents.append(serialize_byte_tensor(texts).item())
    message: bytes = request.SerializeToString()
    return message


def outputs_of(answer: bytes) -> dict[str, bytes]:
    """Return the content of each output of an answer."""
    parsed = service_pb2.ModelInferResponse.FromString(answer)
    return {output.name: raw for output, raw in zip(parsed.outputs, parsed.raw_output_contents, strict=True)}


class Load:
    """Sends requests to one server.

    Args:
        url: its gRPC address.
    """

    def __init__(self, url: str) -> None:
        self.call = grpc.insecure_channel(url).unary_unary(METHOD)

    def run(self, requests: Sequence[bytes], count: int, in_flight: int) -> dict[str, float]:
        """Send ``count`` requests, and return ``p50`` and ``p99`` in milliseconds and ``rate`` in requests a second."""
        seconds: list[float] = []
        places, errors = threading.Semaphore(in_flight), []

        def ended(call: grpc.Future, started: float) -> None:
            seconds.append(time.perf_counter() - started)
            if call.exception() is not None:
                errors.append(call.exception())
            places.release()

        began = time.perf_counter()
        for number in range(count):
            places.acquire()
            started = time.perf_counter()
            call = self.call.future(requests[number % len(requests)])
            call.add_done_callback(lambda call, started=started: ended(call, started))
        for _ in range(in_flight):
            places.acquire()
        whole = time.perf_counter() - began
        if errors:
            raise errors[0]
        p50, p99 = np.quantile(seconds, (0.5, 0.99)) * 1e3
        return {"p50": float(p50), "p99": float(p99), "rate": count / whole}


def count_equal(one: Load, other: Load, requests: Sequence[bytes]) -> int:
    """Return how many requests both servers answer alike, to the last bit."""
    return sum(outputs_of(one.call(request)) == outputs_of(other.call(request)) for request in requests)


def measure(loads: dict[str, Load], requests: list[bytes], counts: dict[int, int], rounds: int) -> dict[int, Any]:
    """Return the median of each figure, by number of requests in flight and server.

    Args:
        loads: the servers, by name.
        requests: the messages to send.
        counts: number of requests of one measurement, by number in flight.
        rounds: number of measurements.
    """
    found: dict[int, dict[str, list[dict[str, float]]]] = {
        in_flight: {name: [] for name in loads} for in_flight in counts
    }
    for load in loads.values():
        load.run(requests, WARM_UP, 8)
    for _ in range(rounds):
        for in_flight, count in counts.items():
            for name, load in loads.items():
                found[in_flight][name].append(load.run(requests, count, in_flight))
    return {
        in_flight: {
            name: {figure: statistics.median(row[figure] for row in rows) for figure in rows[0]}
            for name, rows in sides.items()
        }
        for in_flight, sides in found.items()
    }


def benchmark(artifacts: Path, repository: Path, against: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of both checkouts and of empty steps, and whether the floors are met."""
    data = load_data(artifacts)
    users = np.random.default_rng(0).permutation(len(data.users))[: options.users]
    requests = [request_of(data.raw_history(int(user))) for user in users]
    with ExitStack() as open_:
        sides = {"against": (against, "constant"), "this": (CHECKOUT, "constant"), "empty": (CHECKOUT, "empty")}
        loads = {
            name: Load(open_.enter_context(serving(checkout.resolve(), repository, kind)))
            for name, (checkout, kind) in sides.items()
        }
        equal = count_equal(loads["against"], loads["this"], requests)
        counts = {in_flight: max(options.requests, 10 * in_flight) for in_flight in (1, 8, 32, 64)}
        figures = measure(loads, requests, counts, options.rounds)
        load_average = os.getloadavg()[0]
    latency = figures[1]["this"]["p50"] / figures[1]["against"]["p50"]
    rate = figures[32]["this"]["rate"] / figures[32]["against"]["rate"]
    tail = max(figures[in_flight]["this"]["p99"] / figures[in_flight]["this"]["p50"] for in_flight in (8, 32, 64))
    return {
        "users": len(requests),
        "answers_equal": equal,
        "in_flight": figures,
        "latency_ratio_at_1": latency,
        "rate_ratio_at_32": rate,
        "p99_to_p50": tail,
        "load_average": load_average,
        "floor_met": latency <= LATENCY_CEILING and rate >= RATE_FLOOR and tail <= TAIL_CEILING,
    }


def main() -> None:
    """Parse the command line and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts/movielens-100k"))
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--against", type=Path, required=True, help="Another checkout of this project.")
    parser.add_argument("--users", type=int, default=200, help="Users whose histories are sent.")
    parser.add_argument("--requests", type=int, default=300, help="Requests of one measurement.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="Print JSON instead of lines.")
    options = parser.parse_args()
    if not (options.against / "model_repository").is_dir():
        parser.error(f"--against {options.against} is no checkout of this project: it has no model_repository")
    result = benchmark(options.artifacts, options.repository, options.against, options)
    if options.json:
        print(json.dumps(result))
        return
    print(f"answers that are equal to the last bit: {result['answers_equal']} of {result['users']}")
    for in_flight, sides in result["in_flight"].items():
        for name, row in sides.items():
            print(
                f"{in_flight:3} in flight, {name:8}: p50 {row['p50']:7.2f} ms, p99 {row['p99']:7.2f} ms,"
                f" {row['rate']:7.1f} requests/s"
            )
    print(f"p50 at 1: {result['latency_ratio_at_1']:.2f} of the other's (at most {LATENCY_CEILING})")
    print(f"requests a second at 32: {result['rate_ratio_at_32']:.2f} times the other's (at least {RATE_FLOOR:g})")
    print(f"largest p99 / p50 at 8, 32 and 64: {result['p99_to_p50']:.1f} (at most {TAIL_CEILING:g})")
    print(f"load average: {result['load_average']:.1f}")


if __name__ == "__main__":
    main()
