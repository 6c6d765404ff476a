"""The page on the retrievers: what is chosen, and what its figures are made of."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments.kept import RETRIEVERS, RetrieverRun, read_retriever_runs
from experiments.retriever_tables import (
    PAGE,
    choose,
    ladder,
    mean_metrics,
    plot,
    standard_error,
    summary_block,
    tables_block,
)
from models.retriever.options import RetrieverTraining


def run(
    *,
    model: str = "lrurec",
    seed: int = 42,
    dropout: float = 0.2,
    validation: tuple[int, ...] = (1, 0),
    test: tuple[int, ...] = (1, 0),
    loss: str | None = None,
    titles: str = "none",
    pruned: bool = False,
) -> RetrieverRun:
    options = {
        "model": model,
        "loss": loss,
        "titles": titles,
        "negatives": None,
        "seed": seed,
        "dropout": dropout,
        "weight_decay": 0.01,
        "learning_rate": 0.001,
        "batch_size": 16,
        "max_length": 200,
        "patience": 8,
    }
    curve = [(0, None, 0.1), (200, 5.0, 0.2)]
    facts: dict[str, Any] = {"steps": 400, "best_step": 200, "seconds": 90.0, "curve": curve, "pruned": pruned}
    ranks = (np.array(part, np.int32) for part in (validation, test, test))
    return RetrieverRun("ml-latest-small", options, facts, *ranks)


def test_validation_chooses_and_test_is_never_looked_at():
    """Dropout 0.3 has the better validation ranks and the worse test ranks; its second seed comes along."""
    runs = [
        run(dropout=0.2, validation=(1, 11), test=(1, 1)),
        run(dropout=0.3, validation=(1, 1), test=(20, 20)),
        run(dropout=0.3, seed=43, validation=(11, 11), test=(1, 20)),
        run(dropout=0.5, validation=(), test=(), pruned=True),
    ]
    assert choose(runs) == {"lrurec": runs[1:3]}


def test_a_lucky_second_seed_does_not_choose():
    """Only the first seed of each setting counts: a setting with more seeds has no more chances."""
    runs = [run(dropout=0.2, validation=(1, 1)), run(dropout=0.3, validation=(1, 11)), run(dropout=0.3, seed=43)]
    assert choose(runs)["lrurec"] == runs[:1]


def test_losses_and_titles_are_models_of_their_own():
    """SASRec has two losses, and a retriever with titles is compared with the one without; words and model compete."""
    runs = [run(model="sasrec"), run(model="sasrec", loss="binary"), run(titles="words"), run(titles="model")]
    assert list(choose(runs)) == ["sasrec", "sasrec, binary loss", "lrurec, titles"]


def test_an_option_that_did_not_exist_yet_has_its_default(tmp_path: Path):
    """Two seeds of one setting, the first from before there was a masked share and a mask, belong together."""
    old = {name: value for name, value in run().options.items() if name != "loss"}
    new = asdict(RetrieverTraining(**old)) | {"seed": 43}
    for seed, options in ((42, old), (43, new)):
        facts = json.dumps({"steps": 1, "curve": []})
        metadata = {"dataset": "ml-latest-small", "options": json.dumps(options), "facts": facts}
        table = pa.table({"validation": [1, 2], "test": [1, 2], "last_window": [1, 2]})
        pq.write_table(table.replace_schema_metadata(metadata), tmp_path / f"seed{seed}.parquet")
    assert [found.options["seed"] for found in choose(read_retriever_runs(tmp_path))["lrurec"]] == [42, 43]


def test_figures_by_hand():
    """Ranks (1, 11) and (3, 11): Recall@10 1/2; NDCG@10 (1/2 + 1/4) / 2; standard error of the hits (1, 0, 0, 1)."""
    means = mean_metrics([np.array([1, 11], np.int32), np.array([3, 11], np.int32)])
    assert means["Recall@10"] == 0.5
    assert means["NDCG@10"] == pytest.approx((0.5 + 0.25) / 2)
    assert standard_error([np.array([1, 11, 0, 2], np.int32)]) == pytest.approx(np.sqrt(1 / 3) / 2)


def test_the_page_names_every_run_and_the_papers_figures(tmp_path: Path):
    """Test ranks 1, 2, 30: Recall@10 2/3 next to the paper's .1426; the pruned run is only in the table of all runs."""
    runs = [run(test=(1, 2, 30), validation=(1, 1, 1)), run(dropout=0.5, validation=(), test=(), pruned=True)]
    tables = tables_block(runs).splitlines()
    comparison = next(line for line in tables if line.startswith("| LRURec | 1 |"))
    assert comparison.split(" | ")[7] == "0.6667 / 0.1426"
    assert [line.rsplit(" | ", 1)[1] for line in tables if line.startswith("| LRURec | none | | ")] == [
        "chosen |",
        "pruned |",
    ]
    assert "The 2 users (0.6667 of all) whose true item is in LRURec's top 20;" in "\n".join(tables)
    # NDCG@10 (1 + 1 / log2(3)) / 3 = .5436
    (summary,) = summary_block(runs).splitlines()[2:]
    assert summary == "| ml-latest-small | LRURec | 1 | 0.6667 / 0.1426 | 0.5436 / 0.0705 |"
    plot("ml-latest-small", runs, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.thorough
def test_the_committed_page_is_what_the_code_writes():
    """Run `make results-retrievers` after a change of the tables or of the kept files."""
    runs, text = read_retriever_runs(RETRIEVERS), PAGE.read_text(encoding="utf-8")
    blocks = {"ladder": ladder(), "summary": summary_block(runs), "tables": tables_block(runs)}
    for name, block in blocks.items():
        assert text.split(f"<!-- {name} -->")[1].split(f"<!-- end of {name} -->")[0].strip() == block.strip()
