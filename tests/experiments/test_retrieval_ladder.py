"""The ladder's ranks are those that the retrieval stage itself gives, and the kept files read back."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_up_data import write_circle
from retrieval import random_model, random_statistics

from experiments import ladder_tables, retrieval_ladder
from experiments.kept import SPLITS, keep_state, ladder_path, read_ladder, read_untrained, write_ladder, write_untrained
from experiments.random_ties import in_random_order, write_random_ties
from experiments.retrieval_ladder import MODELS, RUNGS, find_pools, measure
from experiments.untrained_items import (
    WAYS,
    by_chance,
    by_popularity,
    by_retriever,
    by_titles,
    by_way,
    first_items,
    take_out,
)
from models.retriever.candidates import mask, place_of
from models.retriever.options import RetrieverTraining
from models.retriever.stage import RetrievalStage
from models.retriever.trained import TrainedModel, TrainedRetriever
from models.retriever.training import fit_signals
from models.signals.signals import SIGNALS, Signals
from preprocessing.catalogue import Catalogue
from preprocessing.data import Data, load_data

ITEMS, POOL = 40, 8


@pytest.fixture
def circle(tmp_path: Path) -> Data:
    return load_data(write_circle(tmp_path / "circle"))


def pools_of(retrievers: int, monkeypatch: pytest.MonkeyPatch):
    """Return a stage of random models, its statistics, 30 histories and true items, and their pools of 8."""
    monkeypatch.setattr(retrieval_ladder, "POOL", POOL)
    rng = np.random.default_rng(3)
    options = RetrieverTraining(width=8, blocks=1, max_length=6)
    trained = TrainedRetriever([random_model(options, ITEMS, seed) for seed in range(retrievers)], RetrievalStage())
    statistics = random_statistics(ITEMS)
    histories = [rng.permutation(np.arange(1, ITEMS + 1, dtype=np.int32))[: rng.integers(1, 9)] for _ in range(30)]
    truth = rng.integers(1, ITEMS + 1, 30).astype(np.int32)
    return trained, statistics, histories, truth, find_pools(trained, statistics, histories, truth)


@pytest.mark.parametrize("retrievers", [1, 2])
def test_ranks_equal_those_of_the_stage(retrievers, monkeypatch, tmp_path: Path):
    """The reference is the stage of the fitted weights, which writes the candidates that are served."""
    trained, statistics, histories, truth, pools = pools_of(retrievers, monkeypatch)
    rung = replace(next(iter(RUNGS["amazon-2014-beauty"].values())), models=("a", "b")[:retrievers], signals=SIGNALS)
    found = measure("all", rung, dict.fromkeys(SPLITS, pools), np.arange(30))
    stage = RetrievalStage(Signals(statistics, found["weights"], POOL))
    users = [f"u{user}" for user in range(30)]
    expected, _ = replace(trained, stage=stage).write_candidates(tmp_path / "c.parquet", users, histories, truth, 5)
    assert found["test"].tolist() == expected.tolist()
    assert 0 in expected.tolist()
    assert len(set(expected.tolist())) > 10


def test_signals_that_are_left_out_have_no_weight(monkeypatch):
    *_, pools = pools_of(1, monkeypatch)
    rung = retrieval_ladder.Rung(("a",), retrieval_ladder.without("popularity", "transitions"))
    weights = measure("some", rung, dict.fromkeys(SPLITS, pools), np.arange(30))["weights"]
    assert (weights["popularity"], weights["transitions"]) == (0, 0)


def test_every_rung_uses_models_of_its_data_set():
    for dataset, rungs in RUNGS.items():
        assert {model for rung in rungs.values() for model in rung.models} <= set(MODELS[dataset])
        assert ladder_tables.DEFAULT[dataset] in rungs
        assert {name for name, _ in ladder_tables.STEPS[dataset]} - {"plain"} <= set(rungs)
        for options in MODELS[dataset].values():
            RetrieverTraining(**options)


def test_kept_ranks_read_back(tmp_path: Path):
    rungs = {"a + b": {"validation": [1, 300], "test": [0, 12_000], "weights": {"transitions": 0.5}}}
    write_ladder(tmp_path / "l.parquet", ["u", "v"], rungs)
    found = read_ladder(tmp_path / "l.parquet")["a + b"]
    assert ({name: found[name].tolist() for name in SPLITS}, found["weights"]) == (
        {"validation": [1, 300], "test": [0, 12_000]},
        {"transitions": 0.5},
    )
    write_untrained(tmp_path / "n.parquet", ["u", "v"], np.array([True, False]), {"chance": np.array([3, 0])})
    new, ways = read_untrained(tmp_path / "n.parquet")
    assert (new.tolist(), {name: ranks.tolist() for name, ranks in ways.items()}) == ([True, False], {"chance": [3, 0]})


def test_only_equal_times_change_their_order(tmp_path: Path):
    """User v's items 1, 2, 3 share a time and come in any order; the others stay in the order of time."""
    import pandas as pd

    events = [("v", item, time) for item, time in (("4", 9), ("3", 5), ("2", 5), ("1", 5), ("0", 1), ("9", 0))]
    pd.DataFrame([*events, ("u", "1", 7)], columns=["user", "item", "timestamp"]).to_parquet(tmp_path / "i.parquet")
    catalogue = Catalogue([str(item).encode() for item in range(5)], [""] * 5, [1] * 5)
    u, v = in_random_order(tmp_path / "i.parquet", ["u", "v"], catalogue)
    assert u.tolist() == [2]
    assert (v[0], sorted(v[1:4]), v[4]) == (1, [2, 3, 4], 5)


def test_items_are_taken_out_of_training_and_of_histories(circle: Data, tmp_path: Path):
    """Three of 30 items: they follow the others in the catalogue, with their titles, and only test items name them."""
    less = load_data(take_out(tmp_path / "circle", tmp_path / "less"))
    assert (less.catalogue.trained, len(less.catalogue)) == (27, 30)
    titles = [circle.catalogue.title(item) for item in range(1, 31)]
    assert sorted(less.catalogue.title(item) for item in range(1, 31)) == sorted(titles)
    assert max(int(history.max()) for history in less.test_histories()) == 27
    new = less.test > 27
    raw = [circle.catalogue.raw(int(item)) for item in circle.test]
    assert [less.catalogue.raw(int(item)) for item in less.test] == raw
    assert 0 < new.sum() < 60


def test_chance_popularity_and_titles_rank_all_items(circle: Data, tmp_path: Path):
    """Without a count an item that was taken out comes after the counted ones; of titles, only its words matter."""
    less = load_data(take_out(tmp_path / "circle", tmp_path / "less"))
    new = less.test > 27
    for way in (by_chance, by_titles):
        ranks = way(less)
        assert ranks.min() >= 1
        assert ranks.max() <= 30
    lengths = np.array([len(np.unique(history)) for history in less.test_histories()])
    assert (by_popularity(less)[new] > 27 - lengths[new]).all()


def test_an_item_outside_the_vocabulary_has_no_rank(circle: Data, tmp_path: Path):
    less = load_data(take_out(tmp_path / "circle", tmp_path / "less"))
    model = random_model(RetrieverTraining(width=8, blocks=1), less.catalogue.trained)
    ranks = by_retriever(TrainedRetriever([model], RetrievalStage()), less)
    assert ((ranks == 0) == (less.test > 27)).all()


def test_the_ways_with_untrained_items_use_the_same_weights(circle: Data, tmp_path: Path):
    """Without the untrained items, the known ones keep their scores and order; with them, every item has a rank.

    The reference of the known items' ranks takes the untrained ones out of the rows of the whole model.
    """
    less = load_data(take_out(tmp_path / "circle", tmp_path / "less"))
    model = random_model(RetrieverTraining(width=8, blocks=1), len(less.catalogue))
    found = {(way.untrained, way.signals): by_way(model, way, less) for way in WAYS.values()}
    new = less.test > less.catalogue.trained
    for signals in (False, True):
        assert ((found[False, signals] == 0) == new).all()
        assert found[True, signals].min() >= 1
    expected = []
    for row, history, item in zip(model.scores(less.test_histories()), less.test_histories(), less.test, strict=True):
        mask(row, history)
        expected.append(0 if item > less.catalogue.trained else place_of(row[: less.catalogue.trained + 1], int(item)))
    assert found[False, False].tolist() == expected
    assert (found[False, True] != found[False, False]).any()


def test_untrained_items_do_not_change_the_weights(circle: Data, tmp_path: Path):
    """They are no validation user's true item, so weights fitted with them would push them down by what they lack."""
    less = load_data(take_out(tmp_path / "circle", tmp_path / "less"))
    model = random_model(RetrieverTraining(width=8, blocks=1, pool=15), len(less.catalogue))
    known = first_items(model, less.catalogue.trained)
    with_them, without = (fit_signals(model.options, less, [one]).weights for one in (model, known))
    assert with_them == without
    assert len(set(without.values())) > 2


@pytest.mark.shared_data
@pytest.mark.thorough
def test_random_ties_keep_users_and_items(shared_data: Path, tmp_path: Path):
    """On ml-latest-small every user keeps the number of items, and a tenth of the users get another test item."""
    from experiments.datasets import preprocessing_of
    from preprocessing.preprocess import preprocess

    preprocess(preprocessing_of("ml-latest-small", shared_data), tmp_path / "whole")
    before, after = load_data(tmp_path / "whole"), load_data(write_random_ties(tmp_path / "whole", tmp_path / "ties"))
    for one, other in zip(before.test_histories(), after.test_histories(), strict=True):
        assert len(one) == len(other)
    assert 30 < (before.test != after.test).sum() < 120


def test_tables_show_what_is_kept(monkeypatch, tmp_path: Path):
    """Two users and two seeds; Recall@10 of ranks (1, 11) and (1, 1) is .5 and 1."""
    monkeypatch.setattr("experiments.kept.LADDERS", tmp_path)
    monkeypatch.setattr(ladder_tables, "LADDERS", tmp_path)
    for seed in (42, 43):
        rungs = {
            name: {"validation": [1, 1], "test": ranks, "weights": {}}
            for name, ranks in (("plain", [1, 11]), ("plain + signals", [1, 1]), ("titles", [0, 0]))
        }
        write_ladder(ladder_path("ml-latest-small", seed), ["u", "v"], rungs)
    lines = "\n".join(ladder_tables.ladder_block("ml-latest-small"))
    assert "| LRURec | 2 | 0.5000 |" in lines
    assert "| + signals | 2 | 1.0000 |" in lines
    assert "| titles | 2 | 0.0000 | 0.0000 | -1.0000 [-1.0000, -1.0000] |" in lines
    assert ladder_tables.summary_rows("ml-latest-small")[0] == ["LRURec", "0.5000 / 0.5000"]
    assert ladder_tables.ladder_block("amazon-2014-beauty") == []


def test_what_known_items_lose_is_shown_with_its_interval(monkeypatch, tmp_path: Path):
    """Of two known test items one leaves the first ten, so Recall@10 falls by 1/2; the new one is found."""
    monkeypatch.setattr(ladder_tables, "LADDERS", tmp_path)
    ways = {"way": np.array([0, 1, 10]), "way, untrained items too": np.array([3, 1, 11])}
    write_untrained(tmp_path / "d-untrained.parquet", ["u", "v", "w"], np.array([True, False, False]), ways)
    lines = ladder_tables.untrained_block("d")
    assert "| way | 0.0000 | 0.0000 | 1.0000 | 1.0000 | |" in lines
    shown = next(line for line in lines if "untrained items too" in line)
    assert shown.startswith(
        "| way, untrained items too | 1.0000 | 1.0000 | 0.5000 | 1.0000 | -0.5000 [-1.0000, +0.0000] |"
    )


def test_a_kept_state_scores_like_the_trained_retriever(monkeypatch, tmp_path: Path):
    """Half precision has 11 significant bits: scores of up to 10 differ by a few hundredths at most."""
    monkeypatch.setattr("experiments.kept.STATES", tmp_path)
    trained = random_model(RetrieverTraining(width=8, blocks=1), ITEMS)
    opened = TrainedModel.load(keep_state("kept", trained))
    history = [np.array([1, 2, 3], np.int32)]
    (before,), (after,) = trained.scores(history), opened.scores(history)
    np.testing.assert_allclose(after, before, atol=0.05)
    assert (opened.options, opened.items) == (trained.options, ITEMS)
    assert (tmp_path / "kept" / "model.safetensors").stat().st_size < 10_000


def test_the_ladder_takes_a_kept_state_and_trains_nothing(monkeypatch, tmp_path: Path):
    """A folder of an earlier training has precedence: there is none, and the data folder does not even exist."""
    monkeypatch.setattr("experiments.kept.STATES", tmp_path)
    monkeypatch.setattr(retrieval_ladder, "STATES", tmp_path)
    keep_state("amazon-2014-beauty-titles-seed7", random_model(RetrieverTraining(width=8, blocks=1), ITEMS))
    work = tmp_path / "work"
    found = retrieval_ladder.train("amazon-2014-beauty", "titles", 7, work, work / "amazon-2014-beauty")
    assert (found.items, found.options.width) == (ITEMS, 8)
