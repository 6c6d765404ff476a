"""What serving costs beside the ranker's compute: one request at a time, and the throughput of eight at once.

``python -m benchmarks.serving --artifacts DIR --repository DIR [--json]`` starts the real server on the repository. A
request's overhead is its time at the client minus the ranker's own: Triton's statistics of the ranker give the time in
its step, ``compute_infer``, before and after each request. The same with a ranker that answers in exactly 1 ms
(:data:`CONSTANT_RANKER`), the throughput of concurrent clients beside the same prompts scored in this process, and the
latency of a request whose answer the ranker remembers (``--rank-cache``) beside its first time.
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

from client.contract import ENSEMBLE
from client.server import LocalServer
from export.config import CONFIG
from export.offline import ExportedSteps
from export.steps import CACHE_PARAMETER
from preprocessing.data import load_data

OVERHEAD_FLOOR = 0.005
"""Seconds: the most that the median request may take beyond the ranker's compute."""
THROUGHPUT_FLOOR = 0.95
ROUNDS = 5
"""Measurements of either throughput, of which the medians count."""
CONSTANT_RANKER = '''
"""The ranker's place taken by one that keeps the candidates' order and takes 1 ms: for measuring the rest."""

import time

from client.contract import CANDIDATE_ID, CANDIDATE_RANK, CANDIDATE_SCORE, ITEM_ID, RETRIEVER_RANK, SCORE
from export.steps import answer_each


class TritonPythonModel:
    def execute(self, requests):
        return answer_each("ranker", self.answer, requests)

    def answer(self, request):
        end = time.perf_counter() + 1e-3
        while time.perf_counter() < end:
            pass
        columns = (request[spec] for spec in (CANDIDATE_ID, CANDIDATE_SCORE, CANDIDATE_RANK))
        return dict(zip((ITEM_ID, SCORE, RETRIEVER_RANK), columns))
'''


def request_of(history: list[str]) -> list[grpc.InferInput]:
    """The inputs of one request."""
    tensor = grpc.InferInput("HISTORY", [1, len(history)], "BYTES")
    array = np.empty((1, len(history)), dtype=object)
    array[0] = [item.encode() for item in history]
    tensor.set_data_from_numpy(array)
    return [tensor]


def ranker_seconds(client: grpc.InferenceServerClient) -> float:
    """Seconds that the ranker's step has computed so far."""
    stats = client.get_inference_statistics("ranker").model_stats[0].inference_stats
    return float(stats.compute_infer.ns) / 1e9


def overheads(url: str, histories: list[list[str]]) -> list[float]:
    """Seconds beyond the ranker's compute of each request, one after another; two requests warm up."""
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
    """Seconds of each request, one after another."""
    found = []
    with grpc.InferenceServerClient(url) as client:
        for history in histories:
            inputs, began = request_of(history), time.perf_counter()
            client.infer(ENSEMBLE, inputs)
            found.append(time.perf_counter() - began)
    return found


def without_ranker(repository: Path, folder: Path) -> Path:
    """Copies a repository to ``folder`` but for its ranker's version folder, whose place is returned."""
    shutil.copytree(repository, folder, ignore=shutil.ignore_patterns("ranker"))
    (folder / "ranker").mkdir()
    shutil.copy(repository / "ranker" / CONFIG, folder / "ranker")
    return folder / "ranker" / "1"


def served_rate(url: str, histories: list[list[str]], clients: int) -> float:
    """Requests a second of concurrent clients that together send every history once."""
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
    """Prompts a second when this process scores the same prompts, one after another."""
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
    """Both overheads, both rates and whether the floors are met."""
    data = load_data(artifacts)
    histories = [
        [data.catalogue.raw(int(item)).decode() for item in (*data.training[user], data.validation[user])]
        for user in np.random.default_rng(0).permutation(len(data.users))[:users]
    ]
    steps = ExportedSteps.load(repository)
    with LocalServer(repository) as server:
        real = overheads(server.url, histories)
        # In turn, while the other idles: a machine that is slower for a while is so for both.
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
    """Prints the result as a table or, with ``--json``, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts/movielens-100k"))
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--users", type=int, default=24)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = benchmark(options.artifacts, options.repository, options.users, options.clients)
    if options.json:
        print(json.dumps(result))
        return
    for name, row in result["overhead_ms"].items():
        print(f"overhead, {name}: median {row['median']:.2f} ms, p90 {row['p90']:.2f} ms")
    first, again = (result["latency_ms"][name]["median"] for name in ("first time", "remembered"))
    print(f"latency: median {first:.2f} ms the first time, {again:.2f} ms remembered")
    print(f"throughput at {options.clients} clients: {result['throughput_ratio']:.3f} of the ranker in this process")
    print(f"floor met: {result['floor_met']}")


if __name__ == "__main__":
    main()
