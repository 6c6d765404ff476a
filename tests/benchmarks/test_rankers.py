"""Tables of the ranker's results: computed from kept scores, checked on users made up by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks import ranker_runs, rankers
from benchmarks.ranker_runs import (
    Lists,
    Run,
    candidate_orders,
    found_lists,
    keep_letters,
    keep_lists,
    permuted,
    read_lists,
)
from benchmarks.rankers import (
    Kept,
    Row,
    Split,
    alone_row,
    bootstrap,
    fused_row,
    gains,
    likeness_kept,
    load_kept,
    load_lists,
    overall,
    pooled_row,
    popularity_kept,
    reciprocals,
    table,
)
from benchmarks.titles import TitleNearness
from preprocessing.catalogue import Catalogue
from preprocessing.data import load_data


def split(truths: list[int]) -> Split:
    """Users with three candidates each, which the retriever scores 2, 1, 0, training counts 1, 10, 100, and whose
    titles are alike by 0, 1 and .5.
    """
    scores, nearness = np.array([2.0, 1.0, 0.0], np.float32), np.array([0.0, 1.0, 0.5], np.float32)
    counts = np.array([1, 10, 100], np.int32)
    return Split(truths, *([row] * len(truths) for row in (scores, counts, nearness)))


KEPT = Kept(users=8, validation=split([0, 0, 2]), test=split([0, 1, 2, 0]))
RIGHT = [np.eye(3)[truth] * 9 for truth in (0, 0, 2)], [np.eye(3)[truth] * 9 for truth in (0, 1, 2, 0)]
SEED = {"validation": RIGHT[0], "test": RIGHT[1]}
WRONG = {name: [-row for row in rows] for name, rows in SEED.items()}


def test_letters_that_know_the_answer_put_it_first():
    """Every rank is 1, alone and at the fitted weight, where the retriever has hardly a say."""
    assert alone_row("", KEPT, [SEED]).ranks[0].tolist() == [1, 1, 1, 1]
    row = fused_row("", KEPT, [SEED])
    assert row.weights[0] < 0.05
    assert row.ranks[0].tolist() == [1, 1, 1, 1]


def test_each_seed_has_its_own_weight_from_validation():
    """Letters that are always wrong need the retriever, those that are right do not; test users choose nothing."""
    right, wrong = fused_row("", KEPT, [SEED, WRONG]).weights
    assert right < 0.05
    assert wrong == 1.0
    elsewhere = replace(KEPT, test=split([2, 2, 2, 2]))
    assert fused_row("", elsewhere, [SEED, WRONG]).weights == [right, wrong]


def test_popularity_takes_the_letters_place():
    """Counts 1, 10, 100: the third candidate is the most popular, so letters of popularity alone rank it first."""
    row = alone_row("", KEPT, [popularity_kept(KEPT)])
    assert row.ranks[0].tolist() == [3, 2, 1, 3]


def test_likeness_takes_the_letters_place():
    """0, 1 and .5: the second candidate's title is the likest, then the third's."""
    row = alone_row("", KEPT, [likeness_kept(KEPT)])
    assert row.ranks[0].tolist() == [3, 1, 2, 3]


def test_pooled_opinions_are_weighed_on_validation():
    """The letters name every true item, the retriever two of three: pooled all are first; the retriever alone is as it
    was, at 1, 2, 3 and 1.
    """
    assert pooled_row(KEPT, [SEED], ["retriever", "popularity", "language model"]).ranks[0].tolist() == [1, 1, 1, 1]
    assert pooled_row(KEPT, [SEED], ["retriever"]).ranks[0].tolist() == [1, 2, 3, 1]


def test_gains_are_averaged_over_the_seeds_a_user():
    """Ranks 1 and 3: NDCG 1 and 1/2, reciprocal ranks 1 and 1/3; rank 11 counts nothing."""
    ranks = [np.array([1, 11]), np.array([3, 11])]
    assert gains(ranks).tolist() == [0.75, 0.0]
    assert reciprocals(ranks).tolist() == pytest.approx([2 / 3, 0.0])


def test_bootstrap_is_the_normal_approximations_interval():
    """400 differences of mean .1 and deviation .5: .1 +- 1.96 * .5 / 20; the same seed gives the same interval."""
    rng = np.random.default_rng(0)
    differences = rng.normal(size=400)
    differences = 0.1 + 0.5 * (differences - differences.mean()) / differences.std()
    mean, low, high = bootstrap(differences)
    assert mean == pytest.approx(0.1)
    assert (low, high) == pytest.approx((0.1 - 0.049, 0.1 + 0.049), abs=0.005)
    assert bootstrap(differences) == (mean, low, high)
    assert bootstrap(np.zeros(10)) == (0.0, 0.0, 0.0)


def test_table_compares_with_the_retriever_and_the_paper():
    """Retriever ranks 1, 2, 3, 1, letters always 1: NDCG@10 1 to (1 + .6309 + .5 + 1) / 4 = .7827."""
    alone = Row("retriever", [np.array(KEPT.test.truths) + 1], [1.0])
    lines = table(KEPT, [alone, alone_row("letters", KEPT, [SEED], seconds=0.5)], {"LRURec": (0.1,) * 6})
    assert lines[2].startswith("| retriever | | 0.7083 | 0.7827 |")
    assert lines[3].startswith("| letters | 1 | 1.0000 | 1.0000 |")
    assert "| +0.2173 [" in lines[3]
    assert lines[3].endswith("| 0.00 | 0.50 |")
    assert lines[4].startswith("| *the paper's LRURec* | | 0.1000 |")


def test_overall_counts_the_users_without_a_chance():
    """Four of eight users have their item among the candidates: a perfect ranking reaches one half."""
    lines = overall(KEPT, [alone_row("letters", KEPT, [SEED])], {})
    assert lines[2] == "| letters | 0.5000 | 0.5000 | 0.5000 | 0.5000 | 0.5000 | 0.5000 |"


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


def first(lists: Lists, count: int) -> Lists:
    return Lists(*(getattr(lists, name)[:count] for name in ("users", "histories", "items", "scores", "truths")))


def test_what_is_kept_reads_back_and_a_stopped_evaluation_goes_on(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Lists and letters of a trained tiny ranker on real data; stopped after three users, it scores only the rest."""
    data = load_data(artifacts)
    run = Run("movielens-100k", variant="letters")
    splits = {name: first(found_lists(artifacts / "retriever", data, name, 20), 3) for name in ("validation", "test")}
    keep_lists(tmp_path / "lists.parquet", splits, data)
    kept = load_lists(tmp_path / "lists.parquet")
    assert kept.users == 943
    assert kept.test.truths == splits["test"].truths
    for name, lists in read_lists(tmp_path / "lists.parquet", data).items():
        assert (lists.users, lists.truths) == (splits[name].users, splits[name].truths)
        for part in ("histories", "items", "scores"):
            assert all(map(np.array_equal, getattr(lists, part), getattr(splits[name], part)))
    for lists, row in zip(splits["test"].items, kept.test.popularity, strict=True):
        assert row.tolist() == [data.catalogue.counts[item - 1] for item in lists]
    near = TitleNearness(data.catalogue)
    for history, items, row in zip(splits["test"].histories, splits["test"].items, kept.test.nearness, strict=True):
        assert row == pytest.approx([max(near([item], history[-10:])[0]) for item in items])

    keep_letters(tmp_path / "whole.parquet", run, "tuned", artifacts, data, splits)
    whole, said = load_kept(tmp_path / "whole.parquet")
    assert all(np.exp(row.astype(float)).sum() == pytest.approx(1, abs=1e-4) for row in whole["test"])
    assert (said["run"]["variant"], said["way"]) == ("letters", "tuned")
    assert said["seconds_a_request"] > 0

    monkeypatch.setattr(ranker_runs, "SAVE_EVERY", 3)
    reader = ranker_runs._reader
    scored = []

    def stopped(*args: Any) -> object:
        score = reader(*args)

        def once(history: np.ndarray, items: np.ndarray) -> np.ndarray:
            if len(scored) == 4:
                raise KeyboardInterrupt
            scored.append(1)
            return score(history, items)

        return once

    with monkeypatch.context() as patch:
        patch.setattr(ranker_runs, "_reader", stopped)
        with pytest.raises(KeyboardInterrupt):
            keep_letters(tmp_path / "again.parquet", run, "tuned", artifacts, data, splits)
    assert not (tmp_path / "again.parquet").exists()
    keep_letters(tmp_path / "again.parquet", run, "tuned", artifacts, data, splits)
    again, _ = load_kept(tmp_path / "again.parquet")
    assert all((a == b).all() for a, b in zip(again["test"], whole["test"], strict=True))
    assert pq.read_table(tmp_path / "again.parquet").num_rows == 6


def test_tables_name_what_is_kept_and_say_when_nothing_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From two files of made-up users: the rows that they give, with their controls; without files one sentence."""
    monkeypatch.setattr(ranker_runs, "KEPT", tmp_path)
    monkeypatch.setattr(rankers, "PAGE", tmp_path / "ranker.md")
    assert rankers.tables() == "Nothing is kept yet: run `make retrain-ranker`.\n"
    beauty = ranker_runs.RUNS[0]
    columns = {"split": [], "user": [], "truth": [], "scores": [], "popularity": [], "nearness": []}
    letters = {"split": [], "user": [], "letters": []}
    for name, part, known in (("validation", KEPT.validation, RIGHT[0]), ("test", KEPT.test, RIGHT[1])):
        for user, (truth, row) in enumerate(zip(part.truths, known, strict=True)):
            for target, values in (
                (columns, (name, str(user), truth, part.scores[user], part.popularity[user], part.nearness[user])),
                (letters, (name, str(user), row.astype(np.float32))),
            ):
                for column, value in zip(target, values, strict=True):
                    target[column].append(value)
    ranker_runs._write(
        ranker_runs.lists_path(beauty.dataset, "lrurec", 20), ranker_runs.pa.table(columns), {"users": 8}
    )
    for way in ("tuned", "permuted"):
        facts = {"seconds_a_request": 0.5}
        ranker_runs._write(beauty.files()[way], ranker_runs.pa.table(letters), facts)
    text = rankers.tables()
    assert "4 of 8 test users have their item among the candidates." in text
    for label in ("main: fused", "control: titles permuted, fused", "control: popularity, fused", "P5 (reported)"):
        assert f"| {label} |" in text
    assert "NDCG@10 as served to the control's, titles permuted: +0.0000 [+0.0000, +0.0000]." in text
    assert "NDCG@10 as served to the control's, likeness of the titles' words (TF-IDF): +" in text
    assert "| retriever, popularity, words | " in text
    assert (tmp_path / "ranker-weights-amazon-2014-beauty.png").is_file()
