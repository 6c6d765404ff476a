"""Runs perf_analyzer against a server with the histories of real users: throughput, latency and time per step."""

import csv
import json
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import track

from llamarec_client.address import PROXY_VARIABLES, proxy_variable
from llamarec_client.contract import ENSEMBLE, HISTORY
from llamarec_client.errors import ClientError
from llamarec_client.recommender import RecommenderClient, Request
from serving.errors import BenchmarkError
from serving.server.programs import perf_analyzer
from serving.server.step_times import StepTime, mean_times, step_totals_of_all, steps_of_all

Mode = Literal["concurrency", "rate"]
"""Closed loop: a fixed number of requests in flight. Open loop: a fixed rate, at random times (Poisson)."""
FLAGS: Mapping[Mode, Sequence[str]] = {
    "concurrency": ("--concurrency-range",),
    "rate": ("--request-distribution", "poisson", "--request-rate-range"),
}
OVER_HTTP = ("--service-kind", "openai", "--endpoint", "v1/recommend", "--async")
"""Flags that make perf_analyzer post JSON bodies as they are; a status other than 200 ends the measurement."""
WINDOWS = 3
"""Number of windows in one measurement, perf_analyzer's default; it reports all three together."""
ANY_CHANGE = "1000000"
"""Permitted difference between windows in per cent. perf_analyzer reports nothing for windows that differ by more; with
this value it always reports, and we mark the measurement as unstable."""
STABLE = 0.10
"""Maximum difference between the windows of a stable measurement, relative to their mean; perf_analyzer's default."""
CSV_FILE = "benchmark.csv"
PATIENCE = 120.0
"""Timeout of a warm-up request, in seconds."""


@dataclass(frozen=True)
class Row:
    """One measurement."""

    mode: Mode
    load: float
    """Requests in flight, or requests sent per second."""
    throughput: float
    """Requests answered per second."""
    p50_ms: float
    """Latency at the client in milliseconds, like the other percentiles."""
    p90_ms: float
    p95_ms: float
    p99_ms: float
    spread: float
    """Relative difference between the windows, (max - min) / mean, of throughput or latency, whichever is larger."""
    steps: Mapping[str, StepTime]
    """Mean time of a request in each step, in the order of the steps."""

    @property
    def stable(self) -> bool:
        """Whether the windows agree, so that another measurement can be expected to agree too."""
        return self.spread <= STABLE

    def columns(self) -> dict[str, float | str]:
        """Return the row of a table by column name, with two columns for each step."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "steps"}
        split = {f"{step}_{name}": value for step, time in self.steps.items() for name, value in time._asdict().items()}
        return {**own, **split}


def benchmark(
    url: str | Sequence[str],
    histories: Sequence[Sequence[str]],
    loads: Sequence[float] = (1, 2, 3, 4),
    model: str = ENSEMBLE,
    *,
    mode: Mode = "concurrency",
    requests: int = 20,
    warm_up: int = 8,
    gateway: str | None = None,
) -> list[Row]:
    """Measure ``model`` at each load, and return one row per load.

    Args:
        url: ``host:port`` of the server's gRPC endpoint; of all servers, if there are several behind a gateway.
        histories: raw ids of real users, sent in turn.
        loads: numbers of requests in flight, or requests per second.
        model: the ensemble to measure.
        mode: meaning of ``loads``.
        requests: minimum number of requests in each of a measurement's three windows; a window lasts at least a second.
        warm_up: number of requests before the first measurement, which are not measured.
        gateway: ``host:port`` of an HTTP gateway in front of the servers, which gets the requests instead. The times of
            the steps are still the servers'.

    Raises:
        BenchmarkError: there are no histories, perf_analyzer is missing, or it measured nothing.
        ServerUnavailable: nothing listens at the address, or the model is not loaded there.
    """
    if not histories:
        raise BenchmarkError("there are no histories to send: give at least one user")
    urls = [url] if isinstance(url, str) else list(url)
    steps = steps_of_all(urls, model)
    send_warm_up(urls, model, histories, warm_up)
    rows = []
    target = ["-u", gateway, *OVER_HTTP] if gateway else ["-i", "grpc", "-u", urls[0]]
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "histories.json"
        sent = bodies(histories, model) if gateway else input_data(histories)
        data.write_text(json.dumps(sent), encoding="utf-8")
        for load in track(loads, description=f"{model} under load", console=Console(stderr=True)):
            before = step_totals_of_all(urls, steps)
            measured, spread = _measure(target, model, data, mode, load, requests)
            p50, p90, p95, p99 = (measured[f"p{percent} latency"] / 1e3 for percent in (50, 90, 95, 99))
            times = mean_times(before, step_totals_of_all(urls, steps))
            rows.append(Row(mode, load, measured["Inferences/Second"], p50, p90, p95, p99, spread, times))
    return rows


def input_data(histories: Sequence[Sequence[str]]) -> dict[str, object]:
    """Return perf_analyzer's input data: one request per history, without the batch dimension."""
    return {"data": [{HISTORY.name: {"content": list(ids), "shape": [len(ids)]}} for ids in histories]}


def bodies(histories: Sequence[Sequence[str]], model: str) -> dict[str, object]:
    """Return perf_analyzer's input data for the gateway: one body per history."""
    return {"data": [{"payload": [{"history": list(ids), "model": model}]} for ids in histories]}


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write the rows with the columns of :meth:`Row.columns`, with six significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0].columns()))
        writer.writeheader()
        for row in rows:
            writer.writerow({name: v if isinstance(v, str) else f"{v:.6g}" for name, v in row.columns().items()})


def read_csv(path: Path) -> list[Row]:
    """Return the rows that :func:`write_csv` wrote.

    Raises:
        BenchmarkError: the file is missing or not a table of `llamarec bench`.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [_read_row(row) for row in csv.DictReader(file)]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise BenchmarkError(f"{path} is not a table of `llamarec bench`: {error}") from None


def _read_row(row: Mapping[str, str]) -> Row:
    own = {field.name: float(row[field.name]) for field in fields(Row) if field.name not in ("mode", "steps")}
    steps = {
        name.removesuffix("_compute_ms"): StepTime(float(row[name.replace("compute", "queue")]), float(value))
        for name, value in row.items()
        if name.endswith("_compute_ms")
    }
    mode: Mode = "rate" if row["mode"] == "rate" else "concurrency"
    return Row(mode=mode, steps=steps, **own)


def send_warm_up(urls: Sequence[str], model: str, histories: Sequence[Sequence[str]], count: int) -> None:
    """Send the first ``count`` requests, which are not measured, to servers.

    Raises:
        ClientError: one of them failed.
    """
    requests = [Request(histories[place % len(histories)]) for place in range(count)]
    with RecommenderClient(urls) as client:
        answers = client.recommend_many(requests, model=model, timeout=PATIENCE, in_flight=2 * len(urls))
    errors = [answer for answer in answers if isinstance(answer, ClientError)]
    if errors:
        raise errors[0]


def _measure(
    target: Sequence[str], model: str, data: Path, mode: Mode, load: float, requests: int
) -> tuple[dict[str, float], float]:
    """Return one line of perf_analyzer's CSV, with latencies in microseconds, and the spread of its windows."""
    program, environment = perf_analyzer()
    table = data.with_name("measured.csv")
    table.unlink(missing_ok=True)
    command = [str(program), "-v", "-m", model, *target, "--input-data", str(data), "-f", str(table)]
    # Not --request-count: it computes throughput over whole seconds, rounded up: 50 answers/s instead of 700.
    command += ["--measurement-mode", "count_windows", "--measurement-request-count", str(requests)]
    command += [*FLAGS[mode], f"{load:g}", "-s", ANY_CHANGE, "-r", str(WINDOWS)]
    if (
        proxy_variable(target[target.index("-u") + 1]) is None
    ):  # perf_analyzer's own gRPC would use a proxy even for this machine
        environment = {name: value for name, value in environment.items() if name not in PROXY_VARIABLES}
    run = subprocess.run(command, env=dict(environment), capture_output=True, text=True, errors="replace", check=False)
    if run.returncode or not table.is_file():
        said = [line for line in (run.stdout + run.stderr).splitlines() if line.strip()]
        reasons = [line for line in said if "error" in line.lower() or "failed" in line.lower()]
        raise BenchmarkError(
            f"perf_analyzer measured nothing at {mode} {load:g} (exit code {run.returncode}): "
            + "\n".join((reasons or said)[-5:])
        )
    with table.open(encoding="utf-8", newline="") as file:
        return {name: float(value) for name, value in next(csv.DictReader(file)).items() if value}, spread(run.stdout)


def spread(said: str) -> float:
    """Return the relative difference between the windows in the output of ``-v``; infinite if it has fewer than two."""
    passes = re.findall(r"Pass \[\d+\] throughput: ([\d.]+) infer/sec. Avg latency: ([\d.]+) usec", said)
    if len(passes) < 2:
        return float("inf")
    return difference([[float(value) for value in column] for column in zip(*passes, strict=True)])


def difference(measures: Sequence[Sequence[float]]) -> float:
    """Return the largest relative difference, (max - min) / mean, between windows in any of several measures."""
    return max((max(values) - min(values)) / (sum(values) / len(values)) for values in measures)
