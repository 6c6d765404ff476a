"""The tables that the commands print, on terminals of several widths and into a file."""

import io
import re

import pytest
from rich.console import Console

from llamarec import tables
from llamarec.commands.evaluate import print_evaluation
from llamarec.tables import print_table

METRICS = ["MRR@5", "NDCG@5", "Recall@5", "MRR@10", "NDCG@10", "Recall@10", "MRR@20", "NDCG@20", "Recall@20"]


def printed(monkeypatch, width: int | None, title: str, columns: list[str], rows: list[list[object]]) -> str:
    """Return what is printed on a terminal of that width, or into a file."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=width is not None, width=width, color_system=None, legacy_windows=False)
    monkeypatch.setattr(tables, "console", console)
    print_table(title, columns, rows)
    return out.getvalue()


def headings(text: str) -> list[str]:
    """Return the columns' headings, which may continue on further lines, in order."""
    lines = [line.strip("┃").split("┃") for line in text.splitlines() if line.startswith("┃")]
    return ["".join(part.strip() for part in parts) for parts in zip(*lines, strict=True)]


@pytest.mark.parametrize("metrics", [3, 6, 9])
@pytest.mark.parametrize("width", [40, 60, 80, 120, None])
def test_every_heading_and_every_number_can_be_read(monkeypatch, width, metrics):
    """In 80 columns, and so in a file, three headings all read "Recall…": rich cuts a word that is too long."""
    columns = ["", *METRICS[:metrics]]
    rows = [["validation", *(0.1 + n / 1000 for n in range(metrics))], ["test", *(0.5 for _ in range(metrics))]]
    text = printed(monkeypatch, width, "", columns, rows)
    assert "…" not in text
    assert all(len(line) <= (width or tables.WIDEST) for line in text.splitlines())
    if headings(text) != columns:  # exchanged: the metrics stand below each other
        assert headings(text) == ["", "validation", "test"]
        assert [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")] == columns[1:]
    for n in range(metrics):
        assert re.search(rf" {0.1 + n / 1000:.4f} ", text)


def test_a_table_in_a_file_has_one_line_a_row(monkeypatch):
    """No terminal limits it: a program that reads the file finds each row on a line of its own."""
    text = printed(monkeypatch, None, "", ["", *METRICS], [["a long label " * 5, *[0.5] * 9]])
    assert len([line for line in text.splitlines() if line.startswith("│")]) == 1


def test_brackets_in_headings_and_cells_are_text(monkeypatch):
    """Rich would take ``[ms]`` for a style."""
    text = printed(monkeypatch, 80, "time [ms]", ["p50 [ms]"], [["Se7en [1995]"]])
    assert "time [ms]" in text
    assert "p50 [ms]" in text
    assert "Se7en [1995]" in text


@pytest.mark.parametrize(("oracle_users", "said"), [(50, True), (0, False)])
def test_no_comparison_with_an_oracle_that_was_not_asked(capsys, oracle_users, said):
    """With ``--oracle-users 0`` the line ended with "0.0% of 0 equal to fp32 PyTorch's"."""
    table = {"overall": {"Recall@10": 0.5}, "subset": {"Recall@10": 0.5}}
    served = {"identical": 2, "users": 2, "equal_to_oracle": 1.0 if said else 0.0, "oracle_users": oracle_users}
    facts = {"dataset": "d", "users": 2, "subset_users": 1, "fusion_weight": 0.5, "served": served}
    print_evaluation({**facts, "retriever": table, "ranker_alone": table, "ranker": table})
    out = capsys.readouterr().out
    assert "2 of 2 rankings identical to the offline ones" in out
    assert ("fp32" in out) == said
