"""Compares the served answer of every test user with the offline one, bit by bit.

    python -m experiments.served_equals_offline --artifacts DIR --repository DIR    # the end of make results-serving

Items, scores and retriever ranks must be identical at each concurrency, while the server forms batches. A request that
the server rejects because its queue is full is sent again. The exit code is 1 if any answer differs.
"""

import argparse
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path
from typing import Any

from llamarec_client.errors import Overloaded
from llamarec_client.recommender import RecommenderClient
from preprocessing.data import load_data
from serving.offline import ExportedSteps
from serving.server.local import LocalServer

TIMEOUT_S = 300.0
"""Deadline of one answer, which waits for those that are ranked before it."""
RETRY_S = 0.1
"""Pause before a rejected request is sent again."""


def served_answers(url: str, histories: Sequence[Sequence[str]], concurrency: int) -> list[list[tuple[Any, ...]]]:
    """Return the server's answer to each history, as rows of item, score and retriever rank.

    Args:
        url: gRPC address of the server.
        histories: raw ids, oldest first.
        concurrency: number of requests in flight.
    """

    def ask(history: Sequence[str]) -> list[tuple[Any, ...]]:
        while True:
            try:
                return [astuple(row) for row in client.recommend(history, timeout=TIMEOUT_S)]
            except Overloaded:
                time.sleep(RETRY_S)

    with RecommenderClient(url) as client, ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(ask, histories))


def main() -> None:
    """Print, for each concurrency, the number of users whose answers are identical."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts/movielens-100k"))
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--concurrency", type=int, action="append", help="Repeatable. Default: 1 and 16.")
    parser.add_argument("--users", type=int, help="Compare only the first users. Default: all.")
    given = parser.parse_args()
    data, steps = load_data(given.artifacts), ExportedSteps.load(given.repository)
    histories = [data.raw_history(user) for user in range(len(data.users))][: given.users]
    offline = [steps.recommend(history) for history in histories]
    all_identical = True
    with LocalServer(given.repository) as server:
        for concurrency in given.concurrency or [1, 16]:
            served = served_answers(server.url, histories, concurrency)
            identical = sum(answer == expected for answer, expected in zip(served, offline, strict=True))
            all_identical &= identical == len(histories)
            row = {"dataset": data.name, "concurrency": concurrency, "users": len(histories), "identical": identical}
            print(json.dumps(row), flush=True)
    raise SystemExit(0 if all_identical else 1)


if __name__ == "__main__":
    main()
