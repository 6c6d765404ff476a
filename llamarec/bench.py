"""Throughput and latency of a served model under perf_analyzer, with the histories of real users."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from client.benchmark import benchmark
from client.server import LocalServer
from preprocessing.data import load_data
from preprocessing.errors import InputError


def bench(
    artifacts: Path, repository: Path, concurrency: str, model: str, server: str | None, users: int, output: Path
) -> list[dict[str, Any]]:
    """One row a concurrency; a server is started for the measurement unless one is named.

    Raises:
        InputError: the range is none, or there is no data to take histories from.
    """
    first, _, last = concurrency.partition(":")
    if not (first.isdigit() and (last or first).isdigit() and 1 <= int(first) <= int(last or first)):
        raise InputError(f"--concurrency {concurrency!r} is no range: give FIRST:LAST such as 1:4, or one number")
    data = load_data(artifacts)
    chosen = np.random.default_rng(0).permutation(len(data.users))[:users]
    histories = [
        [data.catalogue.raw(int(item)).decode() for item in (*data.training[user], data.validation[user])]
        for user in chosen
    ]
    with nullcontext(server) if server else LocalServer(repository) as running:
        url = running if isinstance(running, str) else running.url
        rows = benchmark(url, histories, (int(first), int(last or first)), model, output)
    return [row.columns() for row in rows]
