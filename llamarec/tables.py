"""What the commands print: readable tables, or JSON for other programs."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from client.benchmark import Row

console = Console()
"""Results, on standard output."""
messages = Console(stderr=True)
"""What is going on, on standard error, so that ``--json`` stays clean."""


def print_json(value: object) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=1, ensure_ascii=False))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table whose numeric columns are aligned right; floats get four digits."""
    if title:
        console.print(title, highlight=False, markup=False)  # a title of the table itself would wrap at its width
    table = Table()
    cells = [[f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    for place, column in enumerate(columns):
        numeric = all(row[place].replace(".", "", 1).replace(",", "").isdigit() for row in cells)
        table.add_column(column, justify="right" if numeric else "left")
    for row in cells:
        table.add_row(*map(escape, row))  # a title may hold square brackets
    console.print(table)


def print_benchmark(model: str, rows: Sequence[Row]) -> None:
    """Throughput and latency at each load, and the mean time of a request in each step."""
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
    print_table(f"{model} under perf_analyzer: answers a second, latency", columns, cells)
    steps = list(rows[0].steps)
    cells = [
        [f"{row.load:g}", *(f"{row.steps[step].compute_ms:.1f} + {row.steps[step].queue_ms:.1f}" for step in steps)]
        for row in rows
    ]
    print_table("where a request's time goes: work + waiting [ms]", [mode, *steps], cells)
    if not all(row.stable for row in rows):
        console.print("unstable: the three windows disagree; measure on a quiet machine or with more --requests")


def print_evaluation(result: Mapping[str, Any]) -> None:
    """The paper's tables 1 and 3, and the comparison with a running server."""
    names = {
        "retriever": "retriever alone",
        "ranker_alone": "+ ranker alone, without the retriever's scores",
        "ranker": f"+ ranker as served (retriever's weight {result['fusion_weight']:g})",
    }
    columns = list(result["retriever"]["overall"])
    for part, title in (
        ("overall", f"{result['dataset']}: all {result['users']:,} test users (the paper's Table 1)"),
        ("subset", f"{result['subset_users']:,} users whose true item is among the top 20 (the paper's Table 3)"),
    ):
        rows = [[label, *result[name][part].values()] for name, label in names.items()]
        print_table(title, ["", *columns], rows)
    if served := result.get("served"):
        console.print(
            f"served: {served['identical']:,} of {served['users']:,} rankings identical to the offline ones; "
            f"{served['equal_to_oracle']:.1%} of {served['oracle_users']:,} equal to fp32 PyTorch's"
        )
