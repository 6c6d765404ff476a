"""The page on the ranker: its tables, on users made up by hand."""

from pathlib import Path

import pytest

from experiments import kept, ranker_tables
from experiments.kept import RankerLists, Scores, lists_path, write_lists, write_scores
from experiments.ranker_runs import RUNS
from experiments.ranker_statistics import alone_row, retriever_row
from experiments.ranker_tables import overall_table, subset_table


def test_rows_are_compared_with_the_retriever_and_the_paper(lists: RankerLists, right: Scores):
    """Retriever ranks 1, 2, 3, 1, the model always 1: NDCG@10 rises to 1 from (1 + .6309 + .5 + 1) / 4 = .7827."""
    rows = [retriever_row(lists), alone_row("model", lists, [right.by_split()], seconds=0.5)]
    lines = subset_table(rows, {"*the paper's LRURec*": (0.1,) * 6})
    assert lines[2].startswith("| retriever | | 0.7083 | 0.7827 |")
    assert lines[3].startswith("| model | 1 | 1.0000 | 1.0000 |")
    assert "| +0.2173 [" in lines[3]
    assert lines[3].endswith("| 0.00 | 0.50 |")
    assert lines[4].startswith("| *the paper's LRURec* | | 0.1000 |")


def test_users_without_their_item_among_the_candidates_count_0(lists: RankerLists, right: Scores):
    """Four of eight users have it: a perfect ranking reaches one half."""
    lines = overall_table(lists, [alone_row("model", lists, [right.by_split()])], {})
    assert lines[2] == "| model | 0.5000 | 0.5000 | 0.5000 | 0.5000 | 0.5000 | 0.5000 |"


def test_the_page_is_written_from_what_is_kept(
    lists: RankerLists, right: Scores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Without files there is one sentence; two files give rows with their controls, the summary and the plot."""
    page = tmp_path / "ranker.md"
    page.write_text("".join(f"<!-- {name} --><!-- end of {name} -->\n" for name in ("summary", "worth", "tables")))
    monkeypatch.setattr(kept, "RANKERS", tmp_path)
    monkeypatch.setattr(ranker_tables, "PAGE", page)
    monkeypatch.setattr("sys.argv", ["ranker_tables"])
    ranker_tables.main()
    assert page.read_text().count("No scores are stored yet: run `make retrain-ranker`.") == 3

    beauty = RUNS[0]
    write_lists(lists_path(beauty.dataset, "lrurec", 20), lists)
    for way in ("tuned", "permuted"):
        write_scores(beauty.files()[way], right)
    ranker_tables.main()
    text = page.read_text()
    # Ranks 1, 2, 3, 1 of four of eight users: NDCG@10 .7827 / 2, Recall@10 1 / 2; with the ranker all are first.
    assert "| amazon-2014-beauty, lrurec | 8 (4) | 0.3914 | 0.5000 | +0.2173 [" in text
    assert "| 0.5000 → 0.5000 | 0.0554 / 0.0971 |" in text
    assert "The subset: 4 of 8 test users, those whose true item is among the 20 candidates." in text
    for label in (
        "main: fused",
        "control: titles permuted, fused",
        "control: popularity in training, fused",
        "control: TF-IDF similarity of titles, fused",
        "P5 (reported)",
    ):
        assert f"| {label} |" in text
    assert 'NDCG@10, as served minus the control "titles permuted": +0.0000 [+0.0000, +0.0000].' in text
    assert 'NDCG@10, as served minus the control "TF-IDF similarity of titles": +' in text
    assert "| retriever, popularity, title similarity | " in text
    # All signals together leave the retriever's order, .7827, and the language model puts every true item first.
    assert "| amazon-2014-beauty, lrurec | main | 1 | 0.7827 | 1.0000 | +0.2173 [" in text
    assert (tmp_path / "ranker-weights-amazon-2014-beauty.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.thorough
def test_the_committed_page_is_what_the_code_writes():
    """Run `make results-ranker` after a change of the tables or of the kept files."""
    every = ranker_tables.all_results()
    text = ranker_tables.PAGE.read_text(encoding="utf-8")
    for name, block in (
        ("summary", ranker_tables.summary_block(every)),
        ("worth", ranker_tables.worth_block(every)),
        ("tables", ranker_tables.tables_block(every)),
    ):
        assert text.split(f"<!-- {name} -->")[1].split(f"<!-- end of {name} -->")[0].strip() == block.strip()
