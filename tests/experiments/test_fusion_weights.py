"""The comparison of ways to choose the retriever's weight."""

from pathlib import Path

import pytest

from experiments import fusion_weights, kept
from experiments.fusion_weights import evaluate
from experiments.kept import RankerLists, Scores, lists_path, write_lists, write_scores
from experiments.ranker_runs import Run


def test_differences_are_those_of_users_who_did_not_choose(
    lists: RankerLists, right: Scores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Perfect scores and true items that the retriever ranks 1, 1 and 3: a low weight gains 0, 0 and 1 - 1/2.

    One user of three chooses, and the smallest of equally good weights wins, which is 0. The gain of the other two is
    on average 0 if the third user chose, else 1/4.
    """
    monkeypatch.setattr(kept, "RANKERS", tmp_path)
    monkeypatch.setattr(fusion_weights, "REPEATS", 20)
    run = Run("ml-latest-small")
    write_lists(lists_path(run.dataset, run.retriever, 20), lists)
    write_scores(run.files()["tuned"], right)
    by_ndcg, by_likelihood, users = evaluate(run, "tuned", 1 / 3)
    assert users == 1
    assert set(by_ndcg.round(9).tolist()) == {0.0, 0.25}
    assert set(by_likelihood.round(9).tolist()) <= {0.0, 0.25}
