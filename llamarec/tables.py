"""What the commands print: readable tables, or JSON for other programs."""

import json
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

console = Console()
"""Results, on standard output."""
messages = Console(stderr=True)
"""Progress and errors, on standard error, so that ``--json`` stays clean."""


def print_json(value: object) -> None:
    """Print one JSON document on standard output."""
    print(json.dumps(value, indent=1, ensure_ascii=False))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table with right-aligned numeric columns; floats get four digits."""
    if title:
        console.print(title, highlight=False, markup=False)  # as the table's own title it would wrap at its width
    table = Table()
    cells = [[f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    for place, column in enumerate(columns):
        numeric = all(row[place].replace(".", "", 1).replace(",", "").isdigit() for row in cells)
        table.add_column(column, justify="right" if numeric else "left")
    for row in cells:
        table.add_row(*map(escape, row))  # a title may hold square brackets
    console.print(table)


def print_row(title: str, row: Mapping[str, object], as_json: bool) -> None:
    """Print one row, as a table or as a JSON object."""
    print_json(dict(row)) if as_json else print_table(title, list(row), [list(row.values())])
