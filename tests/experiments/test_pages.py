"""Generated blocks of a page are replaced, everything around them stays."""

from pathlib import Path

import pytest

from experiments.pages import table, write_blocks


def test_only_the_block_of_that_name_changes(tmp_path: Path):
    page = tmp_path / "page.md"
    tables = "<!-- tables -->\n<!-- end of tables -->\nend\n"
    page.write_text(f"# Title\n\n<!-- summary -->\nold\n<!-- end of summary -->\n\n{tables}")
    for _ in range(2):  # writing again changes nothing
        write_blocks(page, {"summary": "new\n"})
        assert page.read_text() == f"# Title\n\n<!-- summary -->\n\nnew\n\n<!-- end of summary -->\n\n{tables}"


def test_a_page_without_the_block_is_left_alone(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("<!-- summary -->\nno end\n")
    with pytest.raises(ValueError, match="no block <!-- summary -->"):
        write_blocks(page, {"summary": "new"})
    assert page.read_text() == "<!-- summary -->\nno end\n"


def test_a_table_is_markdown():
    assert table(("", "a"), [("row", "1"), ("", "")]) == ["| | a |", "|---|---|", "| row | 1 |", "| | |"]
