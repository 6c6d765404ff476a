"""Writes Markdown tables into the generated blocks of a results page."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from preprocessing.artifacts import write_whole


def table_row(cells: Iterable[str]) -> str:
    """Return one row of a Markdown table."""
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    titles = list(header)
    return [table_row(titles), "|---" * len(titles) + "|", *map(table_row, rows)]


def write_blocks(page: Path, blocks: Mapping[str, str]) -> None:
    """Replace what stands between ``<!-- NAME -->`` and ``<!-- end of NAME -->`` for each block, by its name.

    Raises:
        ValueError: the page has no block of a name.
    """
    text = page.read_text(encoding="utf-8")
    for name, content in blocks.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, begun, rest = text.partition(begin)
        _, ended, after = rest.partition(end)
        if not (begun and ended):
            raise ValueError(f"{page} has no block {begin} ... {end}")
        text = f"{before}{begin}\n\n{content.strip()}\n\n{end}{after}"
    write_whole(page, text)
