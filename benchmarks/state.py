"""Measures the stores of histories: bulk loads, look-ups in a request, events through gRPC, and bytes a user.

    python -m benchmarks.state --repository DIR [--store URL ...] [--users 100000] --json

The benchmark makes up users with 50 items each, loads them from a Parquet file, and starts the real server with the
store. A look-up's cost is the time of a request by USER_ID beyond that of the same request by HISTORY; the two take
turns, so that a slow phase of the machine affects both. Requests go to ``llamarec_retrieval``, whose time varies least.
``alone`` is the time of the look-up itself, in this process.
Without --store, a SQLite file in a temporary folder is measured. A Redis has to be empty, and to run with ``appendonly
yes`` and ``appendfsync always``.
"""

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llamarec_client.contract import RETRIEVAL_ENSEMBLE
from llamarec_client.recommender import RecommenderClient
from preprocessing.catalogue import ITEMS_FILE, Catalogue
from serving.contract import STORE_VARIABLE
from serving.layout import step_artifact
from serving.server.local import LocalServer
from stores.address import open_store
from stores.loading import load_events

ITEMS_A_USER = 50
DAY_MS = 86_400_000
FLOORS = {
    "lookup_ms_p50": 0.5,
    "lookup_ms_p99": 1.5,
    "events_a_second_of_100": 3_000,
    "requests_a_second_of_1": 300,
    "bulk_events_a_second": 30_000,
    "bytes_a_user": 800,
}
"""Maximum of the milliseconds and, for the file, of the bytes; minimum of the rates."""
CLIENTS = 16
"""Concurrent requests with events."""
SECONDS = 5.0
"""Duration of each measurement of a rate."""


def made_up_events(ids: list[str], users: int, path: Path) -> None:
    """Write the events of users who return within days, each with 50 of the items, in the order of their times."""
    chance = np.random.default_rng(0)
    shape = (users, ITEMS_A_USER)
    first = 1_600_000_000_000 + chance.integers(0, 1000 * DAY_MS, (users, 1))
    times = first + np.cumsum(chance.integers(0, 3 * DAY_MS, shape), axis=1)
    order = np.argsort(times, axis=None)
    table = pa.table(
        {
            "user": pa.array(np.repeat(np.arange(users), ITEMS_A_USER)[order]),
            "item": pa.array(ids).take(pa.array(chance.integers(0, len(ids), shape).ravel()[order])),
            "timestamp": pa.array(times.ravel()[order]),
        }
    )
    pq.write_table(table, path)


def bytes_of(url: str) -> int:
    """Return the size of a store: of the file, or of what Redis holds in memory."""
    if url.startswith("sqlite"):
        return os.path.getsize(url.removeprefix("sqlite:///"))
    from redis import Redis

    with Redis.from_url(url) as client:
        return int(client.info("memory")["used_memory"])


def lookup_times(client: RecommenderClient, histories: dict[str, list[str]]) -> tuple[list[float], list[float]]:
    """Return the milliseconds of each user's request by history and by user id."""
    by_history: list[float] = []
    by_user: list[float] = []
    for user, history in histories.items():
        for given, found in ((history, by_history), (None, by_user)):
            began = time.perf_counter()
            client.recommend(given, user_id=user, model=RETRIEVAL_ENSEMBLE)
            found.append(1e3 * (time.perf_counter() - began))
    return by_history, by_user


def rate(client: RecommenderClient, users: int, events: int) -> float:
    """Return the requests per second of concurrent clients that each record so many events of another user."""
    end = time.perf_counter() + SECONDS

    def work(number: int) -> int:
        chance, done = np.random.default_rng(number), 0
        while time.perf_counter() < end:
            client.record(str(chance.integers(users)), [str(item) for item in chance.integers(1, 1000, events)])
            done += 1
        return done

    began = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        done = sum(pool.map(work, range(CLIENTS)))
    return done / (time.perf_counter() - began)


def measured(repository: Path, url: str, users: int, requests: int, file: Path) -> dict[str, Any]:
    """Return the figures of one store.

    Args:
        repository: the exported model repository.
        url: address of an empty store.
        users: number of made-up users in ``file``.
        requests: number of users whose look-ups are measured.
        file: their events.
    """
    with closing(open_store(url)) as store:
        store.last(b"nobody")
    empty, began = bytes_of(url), time.perf_counter()
    loaded = load_events(file, url)
    bulk = loaded.new / (time.perf_counter() - began)
    size = (bytes_of(url) - empty) / users
    os.environ[STORE_VARIABLE] = url
    with closing(open_store(url)) as store:
        chosen = np.random.default_rng(1).permutation(users)[:requests]
        histories, alone = {}, []
        for user in chosen:
            began = time.perf_counter()
            events = store.last(b"%d" % user)
            alone.append(1e3 * (time.perf_counter() - began))
            histories[str(user)] = [event.item.decode() for event in events]
        with LocalServer(repository) as server, RecommenderClient(server.url) as client:
            lookup_times(client, dict(list(histories.items())[:20]))
            by_history, by_user = lookup_times(client, histories)
            hundreds, ones = rate(client, users, 100), rate(client, users, 1)
    p50, p99 = (float(np.quantile(by_user, share) - np.quantile(by_history, share)) for share in (0.5, 0.99))
    return {
        "store": url.partition(":")[0],
        "users": users,
        "bulk_events_a_second": round(bulk),
        "bytes_a_user": round(size),
        "request_ms_p50": round(float(np.quantile(by_history, 0.5)), 3),
        "alone_ms_p50": round(float(np.quantile(alone, 0.5)), 3),
        "alone_ms_p99": round(float(np.quantile(alone, 0.99)), 3),
        "lookup_ms_p50": round(p50, 3),
        "lookup_ms_p99": round(p99, 3),
        "events_a_second_of_100": round(100 * hundreds),
        "requests_a_second_of_1": round(ones),
    }


def main() -> None:
    """Parse the command line and print the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--store", action="append", help="Address of an empty store; repeatable.")
    parser.add_argument("--users", type=int, default=100_000, help="Made-up users, with 50 events each.")
    parser.add_argument("--requests", type=int, default=1_000, help="Users whose look-ups are measured.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of lines.")
    options = parser.parse_args()
    catalogue = Catalogue.load(step_artifact(options.repository, "features") / ITEMS_FILE)
    ids = [catalogue.raw(item).decode() for item in range(1, catalogue.trained + 1)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "events.parquet"
        made_up_events(ids, options.users, file)
        stores = options.store or [f"sqlite:///{folder}/histories.sqlite"]
        rows = [measured(options.repository, url, options.users, options.requests, file) for url in stores]
    if options.json:
        print(json.dumps(rows))
        return
    for name in rows[0]:
        floor = f"   (floor {FLOORS[name]:,})" if name in FLOORS else ""
        print(f"{name:24}" + "".join(f"{row[name]:>12}" for row in rows) + floor)


if __name__ == "__main__":
    main()
