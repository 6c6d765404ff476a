"""Cross-fitting: the candidate lists of a user come from a retriever that was not trained on this user."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_up_data import COLOURED, ITEMS, write_circle
from pipeline import weighed
from tiny import tiny_base

from models.ranker.examples import crossfit
from models.ranker.examples.crossfit import cross_fit
from models.ranker.examples.sampling import Position, RetrievedPools, sample_examples
from models.ranker.examples.sets import training_examples, validation_table
from models.ranker.inference.ranker import Ranker
from models.ranker.inference.scorer import Runtime
from models.ranker.options import RankerTraining
from models.ranker.prompt import Prompt
from models.ranker.training import train_ranker
from models.retriever.candidates import Candidates, CandidateTable
from models.retriever.options import RetrieverTraining
from models.retriever.trained import TrainedRetriever
from models.retriever.training import train_retriever
from models.signals.fitting import count_co_occurrence, count_transitions
from models.titles.vectors import save_vectors
from preprocessing.artifacts import new_artifact, read_manifest
from preprocessing.data import load_data


@pytest.fixture
def copied(artifacts: Path, tmp_path: Path) -> Path:
    """Return a folder with the data and retriever of MovieLens-100K, for cross-fitting."""
    for stage in ("data", "retriever"):
        (tmp_path / stage).symlink_to(artifacts / stage)
    return tmp_path


@pytest.mark.thorough
def test_each_fold_is_trained_on_the_other_users_and_ranks_its_own(copied: Path, monkeypatch: pytest.MonkeyPatch):
    """Each of two folds of 943 users has a retriever trained without its users, on all items, with the same options."""
    data = load_data(copied)
    whole = TrainedRetriever.load(copied / "retriever").options
    fitted = cross_fit(copied, data, folds=2, candidates=20)
    folders = sorted((copied / "crossfit").iterdir())
    assert [folder.name for folder in folders] == ["fold1of2", "fold2of2"]
    for fold, folder in enumerate(folders):
        seen, options = load_data(folder), TrainedRetriever.load(folder / "retriever").options
        assert set(seen.users) == {user for user, its in zip(data.users, fitted.fold, strict=True) if its != fold}
        assert seen.catalogue.trained == data.catalogue.trained
        place = data.users.index(seen.users[7])
        assert seen.training[7].tolist() == data.training[place].tolist()
        assert options == whole

    positions = [Position(user, data.training[user][:9], int(data.training[user][9])) for user in range(6)]
    for position, listed in zip(positions, fitted.lists(positions), strict=True):
        retriever = fitted.retrievers[fitted.fold[position.user]]
        (expected,) = retriever.retrieve([position.history], 20)
        assert listed.items.tolist() == expected.items.tolist()
        assert listed.scores == pytest.approx(expected.scores, abs=1e-5)  # in a batch the last bits differ
        assert not set(listed.items.tolist()) & set(position.history.tolist())

    def trained_again(*args: object) -> None:
        raise AssertionError("a finished fold is not trained again")

    monkeypatch.setattr("models.retriever.training.fit", trained_again)
    assert (cross_fit(copied, data, folds=2, candidates=20).fold == fitted.fold).all()


BRIEF = RetrieverTraining(width=8, blocks=1, max_length=6, epochs=2, validate_every=4, batch_size=16, device="cpu")


def test_signals_are_counted_without_the_folds_own_users(tmp_path: Path):
    """No signal counts the pair that it is to predict: the reference counts the other fold's sequences.

    The words of titles are those of the whole catalogue, and untrained items are retrieved by every fold.
    """
    write_circle(tmp_path, (*COLOURED, "Red Newt"))
    train_retriever(replace(BRIEF, titles="words", signals=True), tmp_path)
    data = load_data(tmp_path)
    fitted = cross_fit(tmp_path, data, folds=2, candidates=20)
    whole = TrainedRetriever.load(tmp_path / "retriever")
    for fold, retriever in enumerate(fitted.retrievers):
        signals = retriever.stage.signals
        assert signals is not None
        others = [data.training[user] for user in np.flatnonzero(fitted.fold != fold)]
        expected = np.bincount(np.concatenate(others), minlength=ITEMS + 2)
        assert signals.statistics.popularity[: ITEMS + 1] == pytest.approx(np.log1p(expected[: ITEMS + 1]))
        for graph, count in (("transitions", count_transitions), ("co_occurrence", count_co_occurrence)):
            edges = getattr(signals.statistics, graph).edges
            for found, counted in zip(edges, count(others, ITEMS + 1).edges, strict=True):
                np.testing.assert_array_equal(found, counted)
        assert whole.stage.signals is not None
        for found, same in zip(
            signals.statistics.likeness.rows, whole.stage.signals.statistics.likeness.rows, strict=True
        ):
            np.testing.assert_array_equal(found, same)
        assert retriever.models[0].items == ITEMS + 1


@pytest.mark.thorough
def test_a_language_models_titles_are_shared_by_the_folds(tmp_path: Path):
    """Each fold trains with the vectors of the whole data set, whose items have the same numbers, without a copy."""
    write_circle(tmp_path)
    vectors = np.random.default_rng(0).normal(size=(ITEMS + 1, 5)).astype(np.float32)
    with new_artifact(tmp_path / "titles", "titles", options={}, inputs={}) as partial:
        save_vectors(partial, vectors)
    train_retriever(replace(BRIEF, titles="model"), tmp_path)
    for _ in range(2):  # the second call finds the folds finished
        cross_fit(tmp_path, load_data(tmp_path), folds=2, candidates=20)
    for folder in (tmp_path / "crossfit").iterdir():
        assert (folder / "titles").resolve() == (tmp_path / "titles").resolve()
        assert read_manifest(folder / "retriever", "retriever", "").options["titles"] == "model"


def test_training_examples_are_the_cross_fitted_lists_at_their_true_ranks(
    copied: Path, monkeypatch: pytest.MonkeyPatch
):
    """With the retriever's negatives and order, an example is an unchanged list at a position whose target it holds."""
    data = load_data(copied)
    lists = [Candidates(np.arange(1, 21, dtype=np.int32), np.zeros(20, np.float32), np.arange(1, 21, dtype=np.int32))]
    asked: list[dict[str, int]] = []

    class Fitted:
        def lists(self, positions: list[Position]) -> list[Candidates]:
            return lists * len(positions)

    monkeypatch.setattr(crossfit, "cross_fit", lambda *args, **options: asked.append(options) or Fitted())
    options = RankerTraining(negatives="retriever", order="retriever", max_prompts=50, folds=3, seed=5)
    examples = training_examples(options, copied, data)
    assert asked == [{"folds": 3, "candidates": 20}]
    assert len(examples) == 50
    assert all((example.candidates == lists[0].items).all() for example in examples)
    expected = sample_examples(data.training, RetrievedPools(Fitted().lists), count=50, seed=5)
    assert [example.truth for example in examples] == [example.truth for example in expected]


def test_negatives_of_the_pool_are_drawn_from_its_best_200(copied: Path, monkeypatch: pytest.MonkeyPatch):
    """Five candidates of a list of 200 items, with their scores; positions whose target it lacks give no example."""
    data = load_data(copied)
    items = np.arange(1, 201, dtype=np.int32)
    listed = Candidates(items, -items.astype(np.float32), items)
    asked: list[dict[str, int]] = []

    class Fitted:
        def lists(self, positions: list[Position]) -> list[Candidates]:
            return [listed] * len(positions)

    monkeypatch.setattr(crossfit, "cross_fit", lambda *args, **options: asked.append(options) or Fitted())
    options = RankerTraining(negatives="pool", candidates=5, max_prompts=50)
    examples = training_examples(options, copied, data)
    assert asked == [{"folds": 4, "candidates": 200}]
    assert len(examples) == 50
    assert all(len(set(example.candidates.tolist())) == 5 for example in examples)
    assert all((example.scores == -example.candidates).all() for example in examples)
    assert max(int(example.candidates.max()) for example in examples) > 150


def test_prompts_with_strangers_come_first(copied: Path, monkeypatch: pytest.MonkeyPatch):
    """The 7 prompts with random candidates, which the retriever did not score, precede the 5 with its own lists."""
    data = load_data(copied)
    lists = Candidates(
        np.arange(1, 21, dtype=np.int32), np.arange(20, dtype=np.float32), np.arange(1, 21, dtype=np.int32)
    )

    class Fitted:
        def lists(self, positions: list[Position]) -> list[Candidates]:
            return [lists] * len(positions)

    monkeypatch.setattr(crossfit, "cross_fit", lambda *args, **options: Fitted())
    options = RankerTraining(random_prompts=7, negatives="retriever", order="retriever", max_prompts=5)
    examples = training_examples(options, copied, data)
    assert [example.scores.any() for example in examples] == [False] * 7 + [True] * 5


def test_more_candidates_than_are_stored_are_retrieved(copied: Path):
    """Every user gets 50 candidates: the first 20 are those of the stored table, and none is in the user's history."""
    data = load_data(copied)
    stored = CandidateTable.read(copied / "retriever" / "candidates-validation.parquet")
    table = validation_table(copied, data, 50)
    assert table.truth.tolist() == stored.truth.tolist()
    for history, row, twenty in list(zip(data.training, table.candidates, stored.candidates, strict=True))[:20]:
        assert len(row.items) == 50
        assert row.items[:20].tolist() == twenty.items.tolist()
        assert not set(row.items.tolist()) & set(history.tolist())
    assert validation_table(copied, data, 20).candidates[0].items.tolist() == stored.candidates[0].items.tolist()


@pytest.mark.thorough
def test_fifty_candidates_are_trained_and_ranked(copied: Path, tmp_path: Path):
    """Index letters A to x work in every stage: training, merging, replaying the probes, and ordering fifty items."""
    brief = RankerTraining(
        max_prompts=4, batch_size=4, validation_users=2, full_validation=False, max_history=3, candidates=50
    )
    with weighed(0.0):
        metrics = train_ranker(brief, copied, str(tiny_base(tmp_path / "base")))
    assert metrics["validation"]["users"] == 2
    letters = json.loads((copied / "ranker" / "verbalizer.json").read_text())["letters"]
    assert (len(letters), list(letters)[-1]) == (50, "x")
    probe = json.loads((copied / "ranker" / "probes.json").read_text())[0]
    assert len(probe["logprobs"]) == 50
    ranker = Ranker.load(copied / "ranker", Runtime())
    order, _ = ranker.rank(Prompt(probe["tokens"], probe["line_ends"]), np.zeros(50, np.float32), np.arange(1, 51))
    assert sorted(order.tolist()) == list(range(50))
    assert order.tolist() == np.argsort(-np.array(probe["logprobs"]), kind="stable").tolist()
