"""`llamarec bench`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llamarec.options import DEFAULT_ARTIFACTS, DEFAULT_REPOSITORY, Artifacts, Json, Repository, addresses, from_given
from llamarec.tables import console, print_json, print_table
from llamarec_client.contract import ENSEMBLE

if TYPE_CHECKING:  # the load test imports gRPC and matplotlib: not for `--help`
    from serving.load_test.perf_analyzer import Row


def bench(
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    repository: Repository = DEFAULT_REPOSITORY,
    concurrency: Annotated[str, typer.Option(help="Requests in flight: FIRST:LAST[:STEP], or one number.")] = "1:4",
    rate: Annotated[
        str | None, typer.Option(help="Requests per second at random times, instead of a concurrency.")
    ] = None,
    model: Annotated[str, typer.Option(help="`llamarec` or `llamarec_retrieval`.")] = ENSEMBLE,
    servers: Annotated[
        str | None,
        typer.Option(
            "--servers",
            "--server",
            help="HOST:PORT of a running server. Several: separated by commas, or `dns:///NAME:PORT` for all addresses"
            " of a name; the client then spreads the requests, without perf_analyzer. Default: one is started for the"
            " measurement.",
        ),
    ] = None,
    gateway: Annotated[
        str | None,
        typer.Option(
            help="`http://HOST:PORT` of a gateway without API keys, to which the requests are sent instead; --servers"
            " are those behind it."
        ),
    ] = None,
    users: Annotated[int, typer.Option(help="Number of real histories, sent in turn.")] = 64,
    requests: Annotated[
        int, typer.Option(help="Minimum number of requests in each of a measurement's three windows.")
    ] = 20,
    warm_up: Annotated[int, typer.Option(help="Number of requests before the first measurement.")] = 8,
    output: Annotated[Path, typer.Option(help="Folder of the CSV file and the report.")] = Path("bench"),
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Two CSV files of earlier measurements: print how they differ, and measure nothing."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure the ensemble under load: throughput, latency and time per step.

    perf_analyzer sends the requests to one server or a gateway, and the client to several servers.
    """
    given = locals()
    from serving.load_test.sweep import Bench
    from serving.load_test.sweep import bench as run
    from serving.load_test.sweep import compare as compare_tables

    if compare:
        differences = compare_tables(*compare)
        columns = ["load", "answers/s", "then", "ratio", "p50 ms", "then", "ratio", ""]
        print_json(differences) if as_json else print_table("", columns, differences)
        return
    rows = run(from_given(Bench, given), artifacts, repository, addresses(servers) if servers else (), output)
    if as_json:
        print_json([row.columns() for row in rows])
        return
    print_benchmark(model, rows)
    console.print(f"written: {output}/benchmark.csv, {output}/report.html")


def print_benchmark(model: str, rows: "Sequence[Row]") -> None:
    """Print throughput and latency at each load, and the mean time of a request in each step."""
    mode = rows[0].mode
    columns = [mode, "answers/s", "p50_ms", "p95_ms", "p99_ms", "windows apart"]
    cells: list[list[object]] = [
        [
            f"{row.load:g}",
            *(f"{value:.2f}" for value in (row.throughput, row.p50_ms, row.p95_ms, row.p99_ms)),
            f"{row.spread:.0%}" + ("" if row.stable else ", unstable"),
        ]
        for row in rows
    ]
    print_table(f"{model} under load: answers per second, latency", columns, cells)
    steps = list(rows[0].steps)
    cells = [
        [f"{row.load:g}", *(f"{row.steps[step].compute_ms:.1f} + {row.steps[step].queue_ms:.1f}" for step in steps)]
        for row in rows
    ]
    print_table("time of a request in each step: compute + queue [ms]", [mode, *steps], cells)
    if not all(row.stable for row in rows):
        console.print("unstable: the three windows disagree; measure on a quiet machine or with more --requests")
