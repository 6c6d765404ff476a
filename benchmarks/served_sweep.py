"""Every test user's served answer beside the offline one: ``python -m benchmarks.served_sweep``.

Items, scores and retriever ranks are compared bit by bit at each concurrency; the server batches. A request that the
server refuses, as its line before the ranker is full, is sent again.
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path

from client.errors import Overloaded
from client.recommender import RecommenderClient
from client.server import LocalServer
from export.offline import ExportedSteps
from llamarec.served import PATIENCE
from preprocessing.data import load_data


def main() -> None:
    """Prints, for each concurrency, how many users' answers are identical; exit code 1 unless all are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts/movielens-100k"))
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--concurrency", type=int, action="append")
    parser.add_argument("--users", type=int, help="only the first; all by default")
    options = parser.parse_args()
    data, steps = load_data(options.artifacts), ExportedSteps.load(options.repository)
    histories = [
        [data.catalogue.raw(int(item)).decode() for item in (*training, validation)]
        for training, validation in zip(data.training, data.validation, strict=True)
    ][: options.users]
    expected = [steps.recommend(history) for history in histories]
    everything = True
    with LocalServer(options.repository) as server:
        for concurrency in options.concurrency or [1, 16]:

            def ask(history: list[str]) -> list[tuple[str, float, int]]:
                with RecommenderClient(server.url) as client:
                    while True:
                        try:
                            answer = client.recommend(history, timeout=PATIENCE)
                        except Overloaded:
                            time.sleep(0.1)
                        else:
                            return [astuple(row) for row in answer]

            with ThreadPoolExecutor(concurrency) as pool:
                answers = list(pool.map(ask, histories))
            identical = sum(answer == offline for answer, offline in zip(answers, expected, strict=True))
            everything &= identical == len(histories)
            row = {"dataset": data.name, "concurrency": concurrency, "users": len(histories), "identical": identical}
            print(json.dumps(row), flush=True)
    raise SystemExit(0 if everything else 1)


if __name__ == "__main__":
    main()
