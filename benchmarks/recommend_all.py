"""Measures how many users a second `llamarec recommend-all` answers, beside a server on the same machine.

    python -m benchmarks.recommend_all --artifacts DIR --repository DIR --stage retrieval

Both answer the same users of a data set, one after the other, and their answers are compared. The batch runs in one
process. The server gets the requests of one client, once with one request in flight and once with several.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from llamarec_client import ClientError, RecommenderClient, Request
from llamarec_client.contract import ENSEMBLE, RETRIEVAL_ENSEMBLE
from serving.batch.recommend_all import RecommendAll, recommend_all
from serving.batch.users import ArtifactUsers, UserHistory
from serving.server.local import LocalServer

MODELS = {"ranking": ENSEMBLE, "retrieval": RETRIEVAL_ENSEMBLE}
TIMEOUT_S = 600.0
WARM_UP = 8
"""Number of requests before a measurement."""
Answer = tuple[list[str], list[float], list[int]]
"""Items, scores and retriever ranks."""


@dataclass(frozen=True)
class FirstUsers:
    """The first users of a data set."""

    rows: Sequence[UserHistory]
    source: str
    dataset: str | None

    @classmethod
    def of(cls, artifacts: Path, count: int | None) -> "FirstUsers":
        """Return the first ``count`` users of the artifacts; all of them if it is None."""
        users = ArtifactUsers(artifacts)
        return cls(list(islice(users, count)), users.source, users.dataset)

    def __iter__(self) -> Iterator[UserHistory]:
        return iter(self.rows)


def batch_rate(users: FirstUsers, repository: Path, stage: str) -> tuple[float, list[Answer]]:
    """Return the users a second of a batch in this process, its models loaded before, and the answers."""
    with tempfile.TemporaryDirectory() as folder:
        # Partitions as they are by default: their files are part of the work.
        manifest = recommend_all(RecommendAll(stage=stage), repository, users, Path(folder) / "output")
        paths = sorted((Path(folder) / "output" / "recommendations").iterdir())
        rows = [row for path in paths for row in pq.read_table(path).to_pylist()]
    return manifest.facts["users_per_second"], [(row["items"], row["scores"], row["retriever_ranks"]) for row in rows]


def served_rate(client: RecommenderClient, users: FirstUsers, model: str, in_flight: int) -> tuple[float, list[Answer]]:
    """Return the users a second of a server, and the answers.

    Raises:
        ClientError: a request failed.
    """
    requests = [Request(row.history, top_k=20) for row in users]
    client.recommend_many(requests[:WARM_UP], model=model, timeout=TIMEOUT_S, in_flight=in_flight)
    began = time.perf_counter()
    results = client.recommend_many(requests, model=model, timeout=TIMEOUT_S, in_flight=in_flight)
    seconds = time.perf_counter() - began
    answers = []
    for result in results:
        if isinstance(result, ClientError):
            raise result
        answers.append(([r.item_id for r in result], [r.score for r in result], [r.retriever_rank for r in result]))
    return len(requests) / seconds, answers


def benchmark(artifacts: Path, repository: Path, stage: str, count: int | None, in_flight: int) -> dict[str, Any]:
    """Return the rates, and how many answers are identical."""
    users = FirstUsers.of(artifacts, count)
    rates = {}
    rates["batch"], written = batch_rate(users, repository, stage)
    identical = len(written)
    with LocalServer(repository) as server, RecommenderClient(server.url) as client:
        for name, flying in (("served, 1 in flight", 1), (f"served, {in_flight} in flight", in_flight)):
            rates[name], answers = served_rate(client, users, MODELS[stage], flying)
            identical = min(identical, sum(one == other for one, other in zip(written, answers, strict=True)))
    return {"stage": stage, "users": len(users.rows), "users_a_second": rates, "identical": identical}


def main() -> None:
    """Parse the command line and print the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts/movielens-100k"))
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--stage", choices=MODELS, default="ranking")
    parser.add_argument("--users", type=int, help="Number of users. Default: all.")
    parser.add_argument("--in-flight", type=int, default=4, help="Concurrent requests of the second measurement.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of lines.")
    options = parser.parse_args()
    result = benchmark(options.artifacts, options.repository, options.stage, options.users, options.in_flight)
    if options.json:
        print(json.dumps(result))
        return
    for name, value in result["users_a_second"].items():
        print(f"{name}: {value:.2f} users/s")
    print(f"{result['identical']:,} of {result['users']:,} answers identical")


if __name__ == "__main__":
    main()
