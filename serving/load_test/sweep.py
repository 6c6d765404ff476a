"""Measures a served model at a range of loads, and compares two measurements."""

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamarec_client.address import DNS
from llamarec_client.contract import ENSEMBLE
from preprocessing.data import load_data
from preprocessing.errors import InputError
from serving.load_test import several_servers
from serving.load_test.perf_analyzer import CSV_FILE, Mode, Row, benchmark, read_csv, write_csv
from serving.load_test.report import REPORT_FILE, Measured, write_report
from serving.server.local import LocalServer
from serving.server.step_times import each_server


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Options of a benchmark."""

    concurrency: str = "1:4"
    """Requests in flight: FIRST:LAST, FIRST:LAST:STEP, or one number."""
    rate: str | None = None
    """Requests per second, in the same notation; replaces ``concurrency``."""
    model: str = ENSEMBLE
    users: int = 64
    """Number of real histories to send in turn: a random sample with a fixed seed, so that lengths are realistic."""
    requests: int = 20
    """Minimum number of requests in each of three windows."""
    warm_up: int = 8
    """Number of requests before the first measurement."""
    gateway: str | None = None
    """``http://HOST:PORT`` of an HTTP gateway in front of the servers, which gets the requests instead."""

    def gateway_address(self) -> str | None:
        """Return host and port of the gateway, if there is one.

        Raises:
            InputError: its address is none of HTTP.
        """
        if self.gateway is None:
            return None
        match = re.fullmatch(r"http://([^/\s]+:\d+)/?", self.gateway)
        if match is None:
            raise InputError(f"--gateway {self.gateway} is no address of a gateway: give http://HOST:PORT")
        return match[1]

    def loads(self) -> list[float]:
        """Return the loads to measure.

        Raises:
            InputError: the range is invalid.
        """
        text, name = (self.concurrency, "--concurrency") if self.rate is None else (self.rate, "--rate")
        try:
            first, *others = map(float, text.split(":"))
            last, step = {0: (first, 1.0), 1: (*others, 1.0), 2: tuple(others)}[len(others)]
        except (ValueError, KeyError):
            first = last = step = 0.0
        loads = [float(load) for load in np.arange(first, last + step / 2, step)] if first > 0 and step > 0 else []
        if not loads or (self.rate is None and any(load != int(load) for load in loads)):
            raise InputError(
                f"{name} {text!r} is not a range: give FIRST:LAST or FIRST:LAST:STEP such as 1:4, or one number"
            )
        return loads

    @property
    def mode(self) -> Mode:
        """Closed loop, or open loop if a rate is given."""
        return "concurrency" if self.rate is None else "rate"


def bench(options: Bench, artifacts: Path, repository: Path, servers: Sequence[str], output: Path) -> list[Row]:
    """Return one row per load, and write ``benchmark.csv`` and ``report.html`` into ``output``.

    perf_analyzer sends the requests to one server or to a gateway, and the client spreads them over several servers.
    Without ``servers``, one is started for the measurement.

    Raises:
        InputError: the range is invalid, there is no data to take histories from, or a gateway is given without its
            servers.
        ClientError: a server does not answer, or a request to several servers failed.
        ServingError: the server did not start, or perf_analyzer measured nothing.
    """
    loads, gateway = options.loads(), options.gateway_address()
    if gateway and not servers:
        raise InputError("--gateway needs --servers: those behind it, whose statistics have the times of the steps")
    data = load_data(artifacts)
    chosen = np.random.default_rng(0).permutation(len(data.users))[: options.users]
    histories = [data.raw_history(int(user)) for user in chosen]
    with nullcontext() if servers else LocalServer(repository) as started:
        urls = [started.url] if started else list(servers)
        sender, rows = _measure(options, urls, histories, loads, gateway)
    write_csv(rows, output / CSV_FILE)
    lengths = [len(history) for history in histories]
    write_report(Measured(data.name, options.model, rows, lengths, sender), output / REPORT_FILE)
    return rows


def _measure(
    options: Bench,
    urls: Sequence[str],
    histories: Sequence[Sequence[str]],
    loads: Sequence[float],
    gateway: str | None,
) -> tuple[str, list[Row]]:
    """Return what sent the requests to running servers, and the rows."""
    window: dict[str, Any] = {"mode": options.mode, "requests": options.requests, "warm_up": options.warm_up}
    if gateway:
        rows = benchmark(each_server(urls), histories, loads, options.model, gateway=gateway, **window)
        return "perf_analyzer, through a gateway", rows
    if len(urls) == 1 and not urls[0].startswith(DNS):
        return "perf_analyzer", benchmark(urls, histories, loads, options.model, **window)
    rows = several_servers.benchmark(urls, histories, loads, options.model, **window)
    return f"client of {', '.join(urls)}", rows


def compare(before: Path, after: Path) -> list[list[object]]:
    """Compare two tables of `llamarec bench`, one row per load that both have.

    Returns:
        ``[load, throughput before, after, ratio, p50 before, after, ratio, verdict]``. A difference counts only if it
        is larger than the spread of the windows in both measurements.

    Raises:
        BenchmarkError: a file is not such a table.
        InputError: they have no load in common.
    """
    first, second = ({(row.mode, row.load): row for row in read_csv(path)} for path in (before, after))
    common: Sequence[tuple[Mode, float]] = [load for load in first if load in second]
    if not common:
        raise InputError(f"{before} and {after} have no load in common: measure both with the same range")
    rows: list[list[object]] = []
    for load in common:
        a, b = first[load], second[load]
        throughput, latency = b.throughput / a.throughput, b.p50_ms / a.p50_ms
        noise = max(a.spread, b.spread)
        apart = max(abs(throughput - 1), abs(latency - 1)) > noise
        better = latency < 1 if abs(latency - 1) >= abs(throughput - 1) else throughput > 1
        verdict = ("better" if better else "worse") if apart else f"within the noise of {noise:.0%}"
        rows.append([f"{load[1]:g}", a.throughput, b.throughput, throughput, a.p50_ms, b.p50_ms, latency, verdict])
    return rows
