"""A run's lists and scores, with a tiny trained ranker on real data."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from experiments import ranker_scores
from experiments.kept import SPLITS, Lists, RankerLists, read_lists, read_scores, write_lists
from experiments.ranker_runs import Run
from experiments.ranker_scores import candidate_orders, find_lists, histories_of, keep_scores, make_score, permuted
from experiments.title_likeness import TitleLikeness
from preprocessing.catalogue import Catalogue
from preprocessing.data import Data, load_data

RUN = Run("movielens-100k", variant="letters")


def first(part: Lists, count: int) -> Lists:
    return Lists(**{name: column[:count] for name, column in vars(part).items()})


@pytest.fixture(scope="module")
def data(artifacts: Path) -> Data:
    return load_data(artifacts)


@pytest.fixture(scope="module")
def lists(artifacts: Path, data: Data, tmp_path_factory: pytest.TempPathFactory) -> RankerLists:
    """Return the lists of three users of each split, as they read back from their file."""
    path = tmp_path_factory.mktemp("lists") / "lists.parquet"
    whole = find_lists(artifacts / "retriever", data, 20)
    write_lists(path, RankerLists(whole.users, first(whole.validation, 3), first(whole.test, 3)))
    return read_lists(path)


def test_lists_hold_the_true_item_and_facts_of_each_candidate(data: Data, lists: RankerLists):
    """Counts are the catalogue's; the likeness is that of the nearest of the ten titles that a prompt shows."""
    likeness = TitleLikeness(data.catalogue)
    assert lists.users == len(data.users) == 943
    for split, truth in (("validation", data.validation), ("test", data.test)):
        part = lists.part(split)
        for row, name in enumerate(part.users):
            user, items = data.users.index(name), part.items[row]
            history = histories_of(data, split)[user]
            assert items[part.truths[row]] == truth[user]
            assert not set(items.tolist()) & set(history.tolist())
            assert (np.diff(part.scores[row]) <= 0).all()
            assert part.popularity[row].tolist() == [data.catalogue.counts[item - 1] for item in items]
            assert part.likeness[row] == pytest.approx([likeness(items[[i]], history[-10:]).max() for i in range(20)])


@pytest.mark.thorough
def test_a_stopped_evaluation_is_resumed(
    artifacts: Path, data: Data, lists: RankerLists, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stopped after four users with three saved, it scores three more and ends with the same file."""
    keep_scores(tmp_path / "whole.parquet", RUN, "tuned", artifacts, data, lists)
    whole = read_scores(tmp_path / "whole.parquet")
    assert (whole.facts["run"]["variant"], whole.facts["way"]) == ("letters", "tuned")
    assert whole.facts["seconds_a_request"] == pytest.approx(whole.facts["seconds"] / 6)
    for split in SPLITS:
        assert np.exp(np.stack(whole.by_split()[split]).astype(float)).sum(axis=1) == pytest.approx(1, abs=1e-4)

    monkeypatch.setattr(ranker_scores, "SAVE_EVERY", 3)
    calls: list[int] = []

    def counted(*given: Any, stop_at: int = 100) -> ranker_scores.Score:
        score = make_score(*given)

        def once(history: Any, items: Any) -> Any:
            if len(calls) == stop_at:
                raise KeyboardInterrupt
            calls.append(1)
            return score(history, items)

        return once

    again = tmp_path / "again.parquet"
    monkeypatch.setattr(ranker_scores, "make_score", lambda *given: counted(*given, stop_at=4))
    with pytest.raises(KeyboardInterrupt):
        keep_scores(again, RUN, "tuned", artifacts, data, lists)
    assert not again.exists()
    calls.clear()
    monkeypatch.setattr(ranker_scores, "make_score", counted)
    keep_scores(again, RUN, "tuned", artifacts, data, lists)
    assert len(calls) == 3
    found = read_scores(again)
    assert (found.splits, found.users) == (whole.splits, whole.users)
    assert all(map(np.array_equal, found.logprobs, whole.logprobs))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert pq.read_table(again).num_rows == 6


def test_permuted_titles_are_the_same_titles_on_other_items():
    """Ids and counts stay; nearly every title moves; the seed decides where."""
    catalogue = Catalogue([b"%d" % n for n in range(50)], [f"title {n}" for n in range(50)], [1] * 50)
    mixed = permuted(catalogue, 1)
    before, after = ([each.title(n) for n in range(1, 51)] for each in (catalogue, mixed))
    assert sorted(before) == sorted(after)
    assert sum(a == b for a, b in zip(before, after, strict=True)) < 10
    assert [mixed.raw(n) for n in range(1, 51)] == [catalogue.raw(n) for n in range(1, 51)]
    assert after == [permuted(catalogue, 1).title(n) for n in range(1, 51)]


def test_orders_begin_with_the_retrievers():
    """Four orders of 20: the retriever's, and three permutations that the seed repeats."""
    orders = list(candidate_orders(20, 4, seed=3))
    assert orders[0].tolist() == list(range(20))
    assert all(sorted(order.tolist()) == list(range(20)) for order in orders)
    assert [order.tolist() for order in candidate_orders(20, 4, seed=3)] == [order.tolist() for order in orders]
