"""The page on retrievers: what is chosen, and what its figures are made of."""

import json
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.retriever_tables import Run, choose, load_runs, mean_metrics, plot, standard_error, tables
from benchmarks.retrievers import RANKS
from models.retriever.options import RetrieverTraining


def run(model="lrurec", seed=42, dropout=0.2, validation=(1, 0), test=(1, 0), loss=None, pruned=False):
    options = {
        "model": model,
        "loss": loss,
        "seed": seed,
        "dropout": dropout,
        "weight_decay": 0.01,
        "learning_rate": 0.001,
        "batch_size": 16,
        "max_length": 200,
        "patience": 8,
    }
    facts = {"steps": 400, "best_step": 200, "seconds": 90.0, "curve": [(0, None, 0.1), (200, 5.0, 0.2)]}
    facts |= {"pruned": True} if pruned else {}
    ranks = (np.array(part, np.int32) for part in (validation, test, test))
    return Run("ml-latest-small", options, facts, *ranks)


def test_validation_chooses_and_test_is_never_looked_at():
    """Dropout 0.3 has the better validation ranks and the worse test ranks; its further seed comes along."""
    runs = [
        run(dropout=0.2, validation=(1, 11), test=(1, 1)),
        run(dropout=0.3, validation=(1, 1), test=(20, 20)),
        run(dropout=0.3, seed=43, validation=(11, 11), test=(1, 20)),
        run(dropout=0.5, validation=(), test=(), pruned=True),
    ]
    assert choose(runs) == {"lrurec": runs[1:3]}


def test_a_lucky_further_seed_does_not_choose():
    """Only the first seed of each setting counts: a setting with more seeds has no more chances."""
    runs = [run(dropout=0.2, validation=(1, 1)), run(dropout=0.3, validation=(1, 11)), run(dropout=0.3, seed=43)]
    assert choose(runs)["lrurec"] == runs[:1]


def test_losses_of_sasrec_are_models_of_their_own():
    runs = [run(model="sasrec"), run(model="sasrec", loss="binary")]
    assert list(choose(runs)) == ["sasrec", "sasrec, binary loss"]


def test_a_run_from_before_an_option_existed_had_its_default(tmp_path):
    """Two seeds of one setting, the first kept when there was no masked share and no mask: they belong together."""
    old = {name: value for name, value in run().options.items() if name != "loss"}
    new = asdict(RetrieverTraining(**old)) | {"seed": 43}
    for seed, options in ((42, old), (43, new)):
        facts = json.dumps({"steps": 1, "curve": []})
        said = {"dataset": "ml-latest-small", "options": json.dumps(options), "facts": facts}
        table = pa.table({"validation": [1, 2], "test": [1, 2], "last_window": [1, 2]})
        pq.write_table(table.replace_schema_metadata(said), tmp_path / f"seed{seed}.parquet")
    assert [found.options["seed"] for found in choose(load_runs(tmp_path))["lrurec"]] == [42, 43]


def test_figures_by_hand():
    """Ranks (1, 11) and (3, 11): Recall@10 1/2; NDCG@10 (1/2 + 1/4) / 2; four users' error of hits (1, 0, 0, 1)."""
    means = mean_metrics([np.array([1, 11]), np.array([3, 11])])
    assert means["Recall@10"] == 0.5
    assert means["NDCG@10"] == pytest.approx((0.5 + 0.25) / 2)
    assert standard_error([np.array([1, 11, 0, 2])]) == pytest.approx(np.sqrt(1 / 3) / 2)


def test_the_page_names_every_run_and_the_papers_figures(tmp_path):
    """A row a model with the paper's Recall@10 (.1426), the pruned run among all, a picture that is a PNG."""
    runs = [run(test=(1, 2, 30), validation=(1, 1, 1)), run(dropout=0.5, validation=(), test=(), pruned=True)]
    page = tables(runs)
    assert "| lrurec | 1 |" in page
    assert "0.6667 / 0.1426" in page
    assert page.count("pruned") == 1
    assert "The 2 users (0.6667 of all)" in page
    plot(runs, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_kept_runs_hold_every_user_once():
    """The committed files: as many ranks as users of the data set (610, 22,332), under 1 MiB each."""
    for path in RANKS.glob("*-seed*.parquet"):
        assert path.stat().st_size < 1 << 20
    for kept in load_runs(RANKS):
        users = {"ml-latest-small": 610, "amazon-2014-beauty": 22_332}[kept.dataset]
        assert len(kept.test) == len(kept.validation) == (0 if kept.pruned else users)
