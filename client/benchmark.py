"""perf_analyzer against a running server, with the histories of real users: throughput, latency and where time goes."""

import csv
import importlib.util
import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import track
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from client.contract import ENSEMBLE, HISTORY
from client.errors import BenchmarkError
from client.launchers import perf_analyzer
from client.messages import client_error

WINDOWS = 3
"""perf_analyzer's own number of windows for one measurement; it reports all three together."""
ANY_CHANGE = "999"
"""Per cent by which windows may differ. perf_analyzer gives no figures at all where they differ by more."""
STATISTICS_TIMEOUT = 10.0
CSV_FILE = "benchmark.csv"
PLOT_FILE = "benchmark.png"


class StepTime(NamedTuple):
    """Mean time of a request in one step."""

    queue_ms: float
    compute_ms: float
    """The step's own work with the copies of its tensors in and out."""


@dataclass(frozen=True)
class Row:
    """One measurement."""

    concurrency: int
    """Requests in flight."""
    throughput: float
    """Requests answered a second."""
    p50_ms: float
    """Latency at the client, in milliseconds, as ``p95_ms`` and ``p99_ms``."""
    p95_ms: float
    p99_ms: float
    steps: Mapping[str, StepTime]
    """Where the time goes in the server, in the order of the steps."""

    def columns(self) -> dict[str, float]:
        """The row of a table: everything by column name, two columns for each step."""
        split = {f"{step}_{name}": value for step, time in self.steps.items() for name, value in time._asdict().items()}
        latency = {"p50_ms": self.p50_ms, "p95_ms": self.p95_ms, "p99_ms": self.p99_ms}
        return {"concurrency": self.concurrency, "throughput": self.throughput, **latency, **split}


class _Total(NamedTuple):
    """A step's running totals since the server started."""

    requests: int
    queue_ns: int
    compute_ns: int


def benchmark(
    url: str,
    histories: Sequence[Sequence[str]],
    concurrency: tuple[int, int] = (1, 4),
    model: str = ENSEMBLE,
    folder: Path = Path("bench"),
    *,
    requests: int = 20,
) -> list[Row]:
    """Measures ``model`` at each concurrency and writes ``benchmark.csv`` and ``benchmark.png`` into ``folder``.

    Args:
        url: ``host:port`` of the server's gRPC endpoint.
        histories: raw ids of real users, sent in turn.
        concurrency: first and last number of requests in flight.
        model: the ensemble to load.
        folder: where the results go.
        requests: fewest requests in each of the three windows of a measurement; a window lasts at least a second.

    Raises:
        BenchmarkError: there is nothing to send, perf_analyzer or matplotlib is missing, or nothing was measured.
        ServerUnavailable: nothing listens at the address, or the model is not loaded there.
    """
    if not histories:
        raise BenchmarkError("there are no histories to send: give at least one user")
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchmarkError("the plot needs matplotlib: `pip install 'llamarec[dev]'`")
    levels = range(concurrency[0], concurrency[1] + 1)
    steps = _steps(url, model)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "histories.json"
        data.write_text(json.dumps(input_data(histories)), encoding="utf-8")
        for level in track(levels, description=f"{model} under load", console=Console(stderr=True)):
            before = _totals(url, steps)
            measured = _measure(url, model, data, level, requests)
            rows.append(_row(level, measured, before, _totals(url, steps)))
    folder.mkdir(parents=True, exist_ok=True)
    _write_csv(rows, folder / CSV_FILE)
    _plot(rows, model, folder / PLOT_FILE)
    return rows


def input_data(histories: Sequence[Sequence[str]]) -> dict[str, object]:
    """perf_analyzer's input data: one request a history, each of its own length, without the batch dimension."""
    return {"data": [{HISTORY.name: {"content": list(ids), "shape": [len(ids)]}} for ids in histories]}


def _steps(url: str, model: str) -> list[str]:
    """The models that an ensemble runs through, in order; the model itself when it is none."""
    try:
        with InferenceServerClient(url) as client:
            config = client.get_model_config(model, client_timeout=STATISTICS_TIMEOUT).config
    except InferenceServerException as error:
        raise client_error(error, url, model, STATISTICS_TIMEOUT) from error
    return [step.model_name for step in config.ensemble_scheduling.step] or [model]


def _totals(url: str, steps: Sequence[str]) -> dict[str, _Total]:
    totals = {}
    with InferenceServerClient(url) as client:
        for step in steps:
            try:
                statistics = client.get_inference_statistics(step, client_timeout=STATISTICS_TIMEOUT)
            except InferenceServerException as error:
                raise client_error(error, url, step, STATISTICS_TIMEOUT) from error
            times = [version.inference_stats for version in statistics.model_stats]
            totals[step] = _Total(
                sum(time.success.count for time in times),
                sum(time.queue.ns for time in times),
                sum(time.compute_input.ns + time.compute_infer.ns + time.compute_output.ns for time in times),
            )
    return totals


def _measure(url: str, model: str, data: Path, level: int, requests: int) -> dict[str, float]:
    """One line of perf_analyzer's CSV, latencies in microseconds."""
    program, environment = perf_analyzer()
    table = data.with_name("measured.csv")
    table.unlink(missing_ok=True)
    command = [str(program), "-m", model, "-i", "grpc", "-u", url, "--input-data", str(data), "-f", str(table)]
    # Not --request-count: its throughput is rounded up to whole seconds, 50 answers/s where there are 700.
    command += ["--measurement-mode", "count_windows", "--measurement-request-count", str(requests)]
    command += ["--concurrency-range", str(level), "-s", ANY_CHANGE, "-r", str(WINDOWS)]
    run = subprocess.run(command, env=dict(environment), capture_output=True, text=True, errors="replace", check=False)
    if run.returncode or not table.is_file():
        said = [line for line in (run.stdout + run.stderr).splitlines() if line.strip()]
        reasons = [line for line in said if "error" in line.lower() or "failed" in line.lower()]
        raise BenchmarkError(
            f"perf_analyzer measured nothing at concurrency {level} (exit code {run.returncode}): "
            + "\n".join((reasons or said)[-5:])
        )
    with table.open(encoding="utf-8", newline="") as file:
        return {name: float(value) for name, value in next(csv.DictReader(file)).items() if value}


def _row(level: int, measured: Mapping[str, float], before: Mapping[str, _Total], after: Mapping[str, _Total]) -> Row:
    steps = {}
    for step, end in after.items():
        requests = max(end.requests - before[step].requests, 1)
        queue, compute = end.queue_ns - before[step].queue_ns, end.compute_ns - before[step].compute_ns
        steps[step] = StepTime(queue / requests / 1e6, compute / requests / 1e6)
    p50, p95, p99 = (measured[f"p{percent} latency"] / 1e3 for percent in (50, 95, 99))
    return Row(level, measured["Inferences/Second"], p50, p95, p99, steps)


def _write_csv(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0].columns()))
        writer.writeheader()
        writer.writerows({name: f"{value:.6g}" for name, value in row.columns().items()} for row in rows)


def _plot(rows: Sequence[Row], model: str, path: Path) -> None:
    """Latency and throughput over concurrency, and beside them the mean time of a request in each step."""
    from matplotlib.figure import Figure

    levels = [row.concurrency for row in rows]
    figure = Figure(figsize=(11, 4), layout="constrained")
    figure.suptitle(f"{model}, perf_analyzer over real histories")
    latency, split = figure.subplots(1, 2)
    for name in ("p50_ms", "p95_ms", "p99_ms"):
        latency.plot(levels, [getattr(row, name) for row in rows], marker="o", label=name.removesuffix("_ms"))
    throughput = latency.twinx()
    throughput.plot(levels, [row.throughput for row in rows], color="grey", linestyle="--", label="throughput")
    throughput.set(ylabel="answers a second (dashed)", ylim=(0, None))
    latency.set(xlabel="requests in flight", ylabel="latency [ms]", xticks=levels, ylim=(0, None))
    latency.legend(loc="lower right")
    bottom = [0.0] * len(rows)
    for place, step in enumerate(rows[0].steps):
        for part, alpha in (("compute_ms", 1.0), ("queue_ms", 0.4)):
            times = [getattr(row.steps[step], part) for row in rows]
            label = f"{step}, {part.removesuffix('_ms')}"
            split.bar(levels, times, bottom=bottom, color=f"C{place}", alpha=alpha, label=label)
            bottom = [low + time for low, time in zip(bottom, times, strict=True)]
    split.set(xlabel="requests in flight", ylabel="mean time of a request [ms]", xticks=levels)
    figure.legend(*split.get_legend_handles_labels(), loc="outside right center", fontsize="small", reverse=True)
    figure.savefig(path, dpi=150)
