"""Loads several servers through the client, which spreads the requests: throughput, latency and time per step.

perf_analyzer talks to one server only. The requests come from one process and one event loop, and their latency
includes the client's own work.
"""

import asyncio
import random
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from llamarec_client.contract import ENSEMBLE
from llamarec_client.recommender import AsyncRecommenderClient
from serving.errors import BenchmarkError
from serving.load_test.perf_analyzer import PATIENCE, WINDOWS, Mode, Row, difference, send_warm_up
from serving.server.step_times import StepTime, each_server, mean_times, step_totals_of_all, steps_of_all

WINDOW_S = 1.0
"""Minimum length of a window in seconds."""


def benchmark(
    urls: Sequence[str],
    histories: Sequence[Sequence[str]],
    loads: Sequence[float] = (1, 2, 3, 4),
    model: str = ENSEMBLE,
    *,
    mode: Mode = "concurrency",
    requests: int = 20,
    warm_up: int = 8,
) -> list[Row]:
    """Measure ``model`` on all servers together at each load, and return one row per load.

    Args:
        urls: addresses as the client takes them; ``dns:///name:port`` names several servers.
        histories: see :func:`serving.load_test.perf_analyzer.benchmark`, like the others; the times of the steps are
            means over all servers.
        loads: see above.
        model: see above.
        mode: see above.
        requests: see above.
        warm_up: number of requests to each server before the first measurement.

    Raises:
        BenchmarkError: there are no histories, a name cannot be resolved, or the servers serve different releases.
        ClientError: a request failed.
    """
    if not histories:
        raise BenchmarkError("there are no histories to send: give at least one user")
    servers = each_server(urls)
    steps = steps_of_all(servers, model)
    for server in servers:
        send_warm_up([server], model, histories, warm_up)
    rows = []
    for load in track(loads, description=f"{model} under load", console=Console(stderr=True)):
        before = step_totals_of_all(servers, steps)
        windows = asyncio.run(_measure(urls, cycle(histories), model, mode, load, requests))
        times = mean_times(before, step_totals_of_all(servers, steps))
        rows.append(_row(mode, load, windows, times))
    return rows


@dataclass
class _Window:
    """Answers of one part of a measurement."""

    began: float
    ended: float = 0.0
    latencies: list[float] = field(default_factory=list)
    """Seconds of each request that was answered within the window."""

    def throughput(self) -> float:
        """Return the answers per second."""
        return len(self.latencies) / (self.ended - self.began)


class _Windows:
    """The windows of one measurement, which follow one another without a pause.

    Args:
        requests: minimum number of answers in each.
    """

    def __init__(self, requests: int) -> None:
        self._requests = requests
        self._current = _Window(time.perf_counter())
        self.complete: list[_Window] = []

    def add(self, latency: float) -> None:
        """Count an answer, and begin the next window if it completes the current one."""
        now = time.perf_counter()
        self._current.latencies.append(latency)
        if len(self._current.latencies) >= self._requests and now - self._current.began >= WINDOW_S:
            self._current.ended = now
            self.complete.append(self._current)
            self._current = _Window(now)

    def are_complete(self) -> bool:
        """Return whether the measurement has all its windows."""
        return len(self.complete) >= WINDOWS


async def _measure(
    urls: Sequence[str], histories: Iterator[Sequence[str]], model: str, mode: Mode, load: float, requests: int
) -> list[_Window]:
    """Send requests until the windows are complete, and return those. What is then in flight is cancelled.

    Raises:
        ClientError: a request failed.
    """
    windows = _Windows(requests)
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    tasks: set[asyncio.Task[None]] = set()

    async def ask() -> None:
        began = time.perf_counter()
        try:
            await client.recommend(next(histories), model=model, timeout=PATIENCE)
        except Exception as error:
            if not ended.done():
                ended.set_exception(error)
            return
        windows.add(time.perf_counter() - began)
        if windows.are_complete() and not ended.done():
            ended.set_result(None)

    async def ask_in_turn() -> None:
        while not ended.done():
            await ask()

    async def ask_at_random() -> None:
        while not ended.done():
            start(ask())
            await asyncio.sleep(random.expovariate(load))

    def start(work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async with AsyncRecommenderClient(urls) as client:
        for _ in range(int(load) if mode == "concurrency" else 1):
            start(ask_in_turn() if mode == "concurrency" else ask_at_random())
        try:
            await ended
        finally:
            left = list(tasks)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
    return windows.complete[:WINDOWS]


def _row(mode: Mode, load: float, windows: Sequence[_Window], times: Mapping[str, StepTime]) -> Row:
    """Return the figures of a measurement: of all windows together, as perf_analyzer reports them."""
    latencies = [latency for window in windows for latency in window.latencies]
    throughput = len(latencies) / (windows[-1].ended - windows[0].began)
    p50, p90, p95, p99 = (1e3 * float(value) for value in np.quantile(latencies, (0.5, 0.9, 0.95, 0.99)))
    means = [float(np.mean(window.latencies)) for window in windows]
    spread = difference([[window.throughput() for window in windows], means])
    return Row(mode, load, throughput, p50, p90, p95, p99, spread, times)
