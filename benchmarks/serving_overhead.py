"""Measures what serving costs beyond the ranker's computation: overhead, throughput and latency of cached answers.

    python -m benchmarks.serving_overhead --artifacts DIR --repository DIR --json

The benchmark starts the real server on the repository. The overhead of a request is its time at the client minus the
ranker's compute time, which is the growth of ``compute_infer`` in Triton's statistics of the ranker during the request.
It is measured with the repository's ranker, and with one that takes exactly 1 ms (:data:`CONSTANT_RANKER`). Throughput
is that of concurrent clients, relative to scoring the same prompts in this process. The latency of an answer from the
ranker's cache (``--rank-cache``) is compared with that of the first request.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import text_format
from tritonclient import grpc
from tritonclient.grpc.model_config_pb2 import ModelConfig

from export.config import CONFIG
from llamarec_client.contract import ENSEMBLE
from preprocessing.data import load_data
from serving.contract import CACHE_PARAMETER
from serving.offline import ExportedSteps
from serving.server.local import LocalServer

OVERHEAD_FLOOR = 0.005
"""Most seconds that the median request may take beyond the ranker's compute time."""
THROUGHPUT_FLOOR = 0.95
"""Minimum served throughput, as a share of that in this process."""
ROUNDS = 5
"""Measurements of each throughput; their medians count."""
CONSTANT_RANKER = '''
"""A ranker that keeps the candidates' order and takes 1 ms, to measure everything else."""

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
        end = time.perf_counter() + 1e-3
        while time.perf_counter() < end:
            pass
        columns = (request[spec] for spec in (CANDIDATE_ID, CANDIDATE_SCORE, CANDIDATE_RANK))
        return dict(zip((ITEM_ID, SCORE, RETRIEVER_RANK), columns))
'''


def request_of(history: list[str]) -> list[grpc.InferInput]:
    """Return the inputs of one request."""
    tensor = grpc.InferInput("HISTORY", [1, len(history)], "BYTES")
    array = np.empty((1, len(history)), dtype=object)
    array[0] = [item.encode() for item in history]
    tensor.set_data_from_numpy(array)
    return [tensor]


def ranker_seconds(client: grpc.InferenceServerClient) -> float:
    """Return the compute time of the ranker's step since the server started, in seconds."""
    stats = client.get_inference_statistics("ranker").model_stats[0].inference_stats
    return float(stats.compute_infer.ns) / 1e9


def overheads(url: str, histories: list[list[str]]) -> list[float]:
    """Return the overhead of each request in seconds; requests follow one another, after two of warm-up."""
    found = []
    with grpc.InferenceServerClient(url) as client:
        for place, history in enumerate(histories[:2] + histories):
            inputs, before = request_of(history), ranker_seconds(client)
            began = time.perf_counter()
            client.infer(ENSEMBLE, inputs)
            seconds = time.perf_counter() - began
            if place >= 2:
                found.append(seconds - (ranker_seconds(client) - before))
    return found


def latencies(url: str, histories: list[list[str]]) -> list[float]:
    """Return the seconds of each request; requests follow one another."""
    found = []
    with grpc.InferenceServerClient(url) as client:
        for history in histories:
            inputs, began = request_of(history), time.perf_counter()
            client.infer(ENSEMBLE, inputs)
            found.append(time.perf_counter() - began)
    return found


def without_ranker(repository: Path, folder: Path) -> Path:
    """Copy a repository to ``folder`` without the ranker's version folder; return where that folder belongs."""
    shutil.copytree(repository, folder, ignore=shutil.ignore_patterns("ranker"))
    (folder / "ranker").mkdir()
    shutil.copy(repository / "ranker" / CONFIG, folder / "ranker")
    return folder / "ranker" / "1"


def served_rate(url: str, histories: list[list[str]], clients: int) -> float:
    """Return the requests per second of concurrent clients that together send every history once."""
    waiting = list(histories)
    lock = threading.Lock()

    def work() -> None:
        with grpc.InferenceServerClient(url) as client:
            while True:
                with lock:
                    if not waiting:
                        return
                    history = waiting.pop()
                client.infer(ENSEMBLE, request_of(history))

    threads = [threading.Thread(target=work) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(histories) / (time.perf_counter() - began)


def in_process_rate(steps: ExportedSteps, histories: list[list[str]]) -> float:
    """Return the prompts per second when this process scores the same prompts one after another."""
    prompts = []
    for history in histories:
        request = steps.features.encode([item.encode() for item in history])
        candidates = steps.candidates(request)
        prompts.append((steps.prompts.build(request.history, candidates.items), candidates))
    prompt, candidates = prompts[0]
    steps.ranker.rank(prompt, candidates.scores, candidates.ranks)
    began = time.perf_counter()
    for prompt, candidates in prompts:
        steps.ranker.rank(prompt, candidates.scores, candidates.ranks)
    return len(histories) / (time.perf_counter() - began)


def benchmark(artifacts: Path, repository: Path, users: int, clients: int) -> dict[str, Any]:
    """Return overheads, latencies and throughputs, and whether the floors are met."""
    data = load_data(artifacts)
    histories = [data.raw_history(int(user)) for user in np.random.default_rng(0).permutation(len(data.users))[:users]]
    steps = ExportedSteps.load(repository)
    with LocalServer(repository) as server:
        real = overheads(server.url, histories)
        # The two take turns, each while the other is idle, so that a slow phase of the machine affects both.
        rates = [
            (served_rate(server.url, histories, clients), in_process_rate(steps, histories)) for _ in range(ROUNDS)
        ]
    served, alone = (statistics.median(side) for side in zip(*rates, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        constant, remembering = Path(folder) / "constant", Path(folder) / "remembering"
        version = without_ranker(repository, constant)
        version.mkdir()
        (version / "model.py").write_text(CONSTANT_RANKER, encoding="utf-8")
        with LocalServer(constant) as server:
            short = overheads(server.url, histories * 4)
        without_ranker(repository, remembering).symlink_to((repository / "ranker" / "1").resolve())
        config = text_format.Parse((repository / "ranker" / CONFIG).read_text(encoding="utf-8"), ModelConfig())
        config.parameters[CACHE_PARAMETER].string_value = str(users)
        (remembering / "ranker" / CONFIG).write_text(text_format.MessageToString(config), encoding="utf-8")
        with LocalServer(remembering) as server:
            first, again = latencies(server.url, histories), latencies(server.url, histories * 4)
    result = {
        "users": users,
        "overhead_ms": {
            "ranker": {"median": 1e3 * statistics.median(real), "p90": 1e3 * float(np.quantile(real, 0.9))},
            "constant 1 ms": {"median": 1e3 * statistics.median(short), "p90": 1e3 * float(np.quantile(short, 0.9))},
        },
        "latency_ms": {
            "first time": {"median": 1e3 * statistics.median(first)},
            "remembered": {"median": 1e3 * statistics.median(again), "p90": 1e3 * float(np.quantile(again, 0.9))},
        },
        "clients": clients,
        "requests_a_second": {"served": served, "in this process": alone},
        "throughput_ratio": served / alone,
    }
    medians = (statistics.median(real), statistics.median(short))
    result["floor_met"] = max(medians) <= OVERHEAD_FLOOR and served / alone >= THROUGHPUT_FLOOR
    return result


def main() -> None:
    """Parse the command line and print the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts/movielens-100k"))
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--users", type=int, default=24, help="Users whose histories are sent.")
    parser.add_argument("--clients", type=int, default=8, help="Concurrent clients for the throughput.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of lines.")
    options = parser.parse_args()
    result = benchmark(options.artifacts, options.repository, options.users, options.clients)
    if options.json:
        print(json.dumps(result))
        return
    for name, row in result["overhead_ms"].items():
        print(f"overhead, {name}: median {row['median']:.2f} ms, p90 {row['p90']:.2f} ms")
    first, again = (result["latency_ms"][name]["median"] for name in ("first time", "remembered"))
    print(f"latency: median {first:.2f} ms for the first request, {again:.2f} ms from the cache")
    print(f"throughput at {options.clients} clients: {result['throughput_ratio']:.3f} of that in this process")
    print(f"floor met: {result['floor_met']}")


if __name__ == "__main__":
    main()
