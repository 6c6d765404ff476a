"""What is kept reads back, and the committed files are whole."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from experiments import kept
from experiments.kept import (
    RANKERS,
    RETRIEVERS,
    SPLITS,
    RankerLists,
    Scores,
    ranks_path,
    read_lists,
    read_retriever_runs,
    read_scores,
    write_lists,
    write_ranks,
    write_scores,
)
from experiments.ranker_runs import RUNS, Run
from models.retriever.options import RetrieverTraining
from preprocessing.errors import InputError

USERS = {"ml-latest-small": 610, "amazon-2014-beauty": 22_332}
ITEMS = {"ml-latest-small": 3_650, "amazon-2014-beauty": 12_086}
"""The paper's Table 2."""
MODELS = {"bert4rec", "lrurec", "narm", "sasrec", "sasrec, binary loss"}


def test_lists_read_back(lists: RankerLists, tmp_path: Path):
    write_lists(tmp_path / "lists.parquet", lists)
    found = read_lists(tmp_path / "lists.parquet")
    assert found.users == 8
    for split in SPLITS:
        before, after = lists.part(split), found.part(split)
        assert (after.users, after.truths) == (before.users, before.truths)
        for name in ("items", "scores", "popularity", "likeness"):
            for a, b in zip(getattr(before, name), getattr(after, name), strict=True):
                assert (a.dtype, a.tolist()) == (b.dtype, b.tolist())


def test_lists_of_an_older_version_are_refused(lists: RankerLists, tmp_path: Path):
    path = tmp_path / "lists.parquet"
    write_lists(path, lists)
    pq.write_table(pq.read_table(path).drop_columns(["items"]), path)
    with pytest.raises(InputError, match="has no column items: delete it"):
        read_lists(path)


def test_scores_read_back(right: Scores, tmp_path: Path):
    """The column keeps the name that the committed files have."""
    write_scores(tmp_path / "scores.parquet", right)
    assert pq.read_schema(tmp_path / "scores.parquet").names == ["split", "user", "letters"]
    found = read_scores(tmp_path / "scores.parquet")
    assert (found.splits, found.users, found.facts) == (right.splits, right.users, {"seconds_a_request": 0.5})
    assert [row.tolist() for row in found.by_split()["test"]] == [row.tolist() for row in right.logprobs[3:]]


def test_ranks_read_back(tmp_path: Path):
    """A pruned run has no ranks."""
    options = RetrieverTraining(dropout=0.5)
    columns = {"user": ["a", "b"], "validation": [1, 2], "test": [3, 4], "last_window": [5, 6]}
    write_ranks(tmp_path / "a.parquet", "ml-latest-small", options, {"steps": 7}, columns)
    write_ranks(tmp_path / "b.parquet", "ml-latest-small", replace(options, seed=43), {"pruned": True}, {})
    run, pruned = read_retriever_runs(tmp_path)
    assert (run.dataset, run.model, run.options["dropout"]) == ("ml-latest-small", "lrurec", 0.5)
    assert run.facts == {"steps": 7}
    assert (run.validation.tolist(), run.test.tolist(), run.last_window.tolist()) == ([1, 2], [3, 4], [5, 6])
    assert pruned.pruned
    assert len(pruned.test) == 0


def test_committed_ranks_hold_every_user_once():
    """Each data set has every model; ranks are places in its catalogue, of as many users as the paper counts."""
    runs = read_retriever_runs(RETRIEVERS)
    full = [run for run in runs if run.options["titles"] == "none" and run.options["negatives"] is None]
    plain = {(run.dataset, run.model) for run in full}
    assert plain == {(dataset, model) for dataset in USERS for model in MODELS}
    assert ("amazon-2014-beauty", "lrurec, titles") in {(run.dataset, run.model) for run in runs}
    for run in runs:
        users = 0 if run.pruned else USERS[run.dataset]
        for ranks in (run.validation, run.test, run.last_window):
            assert len(ranks) == users
            assert ((ranks >= 0) & (ranks <= ITEMS[run.dataset])).all()
    paths = list(RETRIEVERS.glob("*.parquet"))
    assert {ranks_path(run.dataset, RetrieverTraining(**run.options)).name for run in runs} == {p.name for p in paths}
    assert max(path.stat().st_size for path in paths) < 1 << 20


def committed() -> list[tuple[Run, Path]]:
    return [(run, path) for run in RUNS for path in run.files().values() if path.exists()]


def test_every_committed_score_belongs_to_a_run():
    """No file is left over from a run that the queue no longer has."""
    lists = {path for path in RANKERS.glob("*.parquet") if "-top" in path.stem}
    assert {path for _, path in committed()} == set(RANKERS.glob("*.parquet")) - lists
    assert {path.stem for path in lists} == {
        "amazon-2014-beauty-lrurec-top20",
        "amazon-2014-beauty-sasrec-top20",
        "ml-latest-small-lrurec-top20",
        "ml-latest-small-lrurec-top50",
    }


@pytest.mark.thorough
@pytest.mark.parametrize(("run", "path"), committed(), ids=lambda given: getattr(given, "stem", ""))
def test_committed_scores_are_those_of_the_lists(run: Run, path: Path):
    """The same users in the same order, and for each a distribution over the candidates: probabilities sum to 1."""
    scores = read_scores(path)
    lists = read_lists(kept.lists_path(run.dataset, run.retriever, run.options().candidates))
    for split in SPLITS:
        part = lists.part(split)
        assert [user for user, its in zip(scores.users, scores.splits, strict=True) if its == split] == part.users
        found = scores.by_split()[split]
        assert [len(row) for row in found] == [len(row) for row in part.items]
        assert np.exp(np.stack(found).astype(float)).sum(axis=1) == pytest.approx(1, abs=1e-4)
