"""What the commands print: readable tables, or JSON for other programs."""

import json
from collections.abc import Iterable, Mapping, Sequence

from rich.cells import cell_len
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


WIDEST = 250
"""Width in characters of what is printed into a file or a pipe, where no terminal limits it."""


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table with right-aligned numeric columns; floats get four digits.

    No word is cut: on a narrow terminal, headings and texts continue on the next line, and a table that still does not
    fit has its rows and columns exchanged if that makes it narrower.
    """
    if not console.is_terminal:
        console.width = WIDEST
    if title:
        console.print(title, highlight=False, markup=False)  # as the table's own title it would wrap at its width
    cells = [[f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    if _least_width(columns, cells) > console.width and len(cells) < len(columns):
        columns, *cells = map(list, zip(columns, *cells, strict=True))
    table = Table()
    room = console.width - _least_width(columns, cells)
    for place, column in enumerate(columns):
        texts = [row[place] for row in cells]
        numeric = all(text.replace(".", "", 1).replace(",", "").isdigit() for text in texts)
        width = None
        if room >= 0:  # rich itself would narrow the widest columns first, and cut their words
            least = _longest_word([column, *texts])
            width = min(max(map(cell_len, [column, *texts])), least + room)
            room -= width - least
        table.add_column(escape(column), justify="right" if numeric else "left", overflow="fold", width=width)
    for row in cells:
        table.add_row(*map(escape, row))  # a title may hold square brackets
    console.print(table)


def _least_width(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> int:
    """Return the width of a table whose columns are as narrow as their words allow."""
    return 1 + sum(3 + _longest_word(texts) for texts in zip(columns, *cells, strict=True))


def _longest_word(texts: Iterable[str]) -> int:
    return max((cell_len(word) for text in texts for word in text.split()), default=0)


def print_row(title: str, row: Mapping[str, object], as_json: bool) -> None:
    """Print one row, as a table or as a JSON object."""
    print_json(dict(row)) if as_json else print_table(title, list(row), [list(row.values())])


def print_gain(gain: Mapping[str, float], users: str) -> None:
    """Print what the language model adds to the retrieval stage, and what follows from its interval.

    Args:
        gain: ``mean``, ``low`` and ``high`` of the difference in NDCG@10.
        users: over whom it was measured.
    """
    if gain["low"] > 0:
        verdict = "it is worth its pass here"
    elif gain["high"] < 0:
        verdict = (
            "it makes the list worse: serve the retrieval stage alone (llamarec_retrieval), or train on more prompts"
        )
    else:
        verdict = "the retrieval stage alone (llamarec_retrieval) is as good here, as far as these users can tell"
    console.print(
        f"the language model adds {gain['mean']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}] NDCG@10 for {users}:"
        f" {verdict}",
        soft_wrap=True,
    )
