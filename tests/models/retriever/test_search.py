"""The search for dropout and weight decay: what it tries and keeps, and that it resumes where it was stopped."""

import json
from dataclasses import replace

import numpy as np
import pytest
from made_up_data import COLOURED, ITEMS, NUMBERED, write_circle

from models.retriever import search as module
from models.retriever.options import RetrieverTraining
from models.retriever.search import SPACES, Search, search
from preprocessing.errors import InputError
from preprocessing.preprocess import Preprocessing, preprocess

TRAINING = RetrieverTraining(width=8, blocks=1, max_length=6, epochs=1, validate_every=2, batch_size=16, seed=3)
GRID = Search(training=TRAINING, space="paper", budget=10)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return data of 60 users who walk around the same circle of 30 items."""
    folder = tmp_path_factory.mktemp("cycling")
    rows = ["user,item,timestamp,title"]
    for user in range(60):
        rows += [f"{user},{(user + step) % 30},{step},Film {(user + step) % 30}" for step in range(12)]
    (folder / "log.csv").write_text("\n".join(rows) + "\n")
    preprocess(Preprocessing(dataset="table", raw=folder / "log.csv"), folder)
    return folder / "data"


@pytest.fixture
def artifacts(data, tmp_path):
    (tmp_path / "data").symlink_to(data)
    return tmp_path


def tried(result):
    return sorted((row["weight_decay"], row["dropout"]) for row in result["trials"])


@pytest.mark.thorough
def test_the_papers_grid_is_tried_once_each(artifacts):
    """For any budget, the grid is weight decay {0, 0.01} x dropout {0.1, .. 0.5} (section 4.0.4), best first."""
    result = search(replace(GRID, budget=50), artifacts)
    assert tried(result) == [(decay, share / 10) for decay in (0.0, 0.01) for share in range(1, 6)]
    ended = [row["validation_Recall@10"] for row in result["trials"] if row["state"] == "complete"]
    assert result["best"] == result["trials"][0]
    assert result["best"]["validation_Recall@10"] == max(ended)
    (folder,) = (artifacts / "tuning").iterdir()
    assert json.loads((folder / "trials.json").read_text()) == result
    assert not list(folder.glob("*.pt"))


def test_a_larger_budget_continues_the_search(artifacts, monkeypatch):
    """After two trainings, a budget of three adds one: the first two are neither trained nor drawn again."""
    wide = Search(training=TRAINING, space="wide", budget=2)
    first = search(wide, artifacts)
    trainings = count_trainings(monkeypatch)
    assert search(wide, artifacts) == first
    assert len(trainings) == 0
    second = search(replace(wide, budget=3), artifacts)
    assert len(trainings) == 1
    assert len(set(tried(second))) == 3
    assert set(tried(first)) < set(tried(second))


def count_trainings(monkeypatch):
    """Return a list to which every later training appends the step at which it begins."""
    begun, fit = [], module.fit

    def counted(training, data, checkpoint, *rest):
        state = checkpoint.load()
        begun.append(json.loads(state["progress"])["step"] if state else 0)
        return fit(training, data, checkpoint, *rest)

    monkeypatch.setattr(module, "fit", counted)
    return begun


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_training_goes_on_from_its_last_validation(artifacts, monkeypatch, stop):
    """A training stopped at its first and then at its next validation is finished by the third run and listed once.

    Ctrl-C is reported to the study; any other end of the process is not.
    """
    report = module.Trial.report
    begun = count_trainings(monkeypatch)
    for stopped_at in (0, 2):

        def stopped(trial, value, step, last=stopped_at):
            report(trial, value, step)
            if step == last:
                raise stop

        with monkeypatch.context() as patched:
            patched.setattr(module.Trial, "report", stopped)
            with pytest.raises(stop):
                search(replace(GRID, budget=1), artifacts)
    (left,) = (artifacts / "tuning").glob("*/*.pt")
    result = search(replace(GRID, budget=1), artifacts)
    assert begun == [0, 0, 2]
    (row,) = result["trials"]
    assert left.stem == f"weight_decay-{row['weight_decay']:g}-dropout-{row['dropout']:g}"
    assert row["steps"] > 2


def test_a_poor_training_is_pruned(artifacts, monkeypatch):
    """Three trainings reach 0.9 at every validation; the fourth reaches 0.1 and ends at the first that may prune it."""
    course = module.fit

    def watched(training, data, checkpoint, logs, watch, titles):
        value = 0.9 if len(seen) < 3 else 0.1
        seen.append([])

        def watch_instead(step, _):
            seen[-1].append(step)
            watch(step, value)

        return course(training, data, checkpoint, logs, watch_instead, titles)

    seen = []
    monkeypatch.setattr(module, "fit", watched)
    training = replace(TRAINING, patience=4, epochs=4)
    result = search(Search(training=training, space="dropout", budget=4), artifacts)
    assert [row["state"] for row in result["trials"]] == ["complete"] * 3 + ["pruned"]
    assert seen[3] == [0, 2, 4]
    assert result["trials"][-1]["validation_Recall@10"] == 0.1


def test_every_training_reads_the_titles(tmp_path, monkeypatch):
    """A search with the words of titles trains with the vectors of the trained items' titles, which are encoded once.

    Item 31, which no sequence contains, is not trained.
    """
    fit, given = module.fit, []
    monkeypatch.setattr(module, "fit", lambda *rest: given.append(rest[-1]) or fit(*rest))
    write_circle(tmp_path, (*COLOURED, "Red Newt"))
    with_titles = replace(TRAINING, titles="words")
    result = search(Search(training=with_titles, space="dropout", budget=2), tmp_path)
    assert [row["state"] for row in result["trials"]] == ["complete"] * 2
    assert [len(vectors) for vectors in given] == [ITEMS + 1] * 2
    assert np.shares_memory(*given)
    without = search(Search(training=TRAINING, space="dropout", budget=1), tmp_path)
    assert given[2] is None
    assert without["folder"] != result["folder"]


def test_titles_without_words_in_common_are_refused(tmp_path):
    """Before any training, with the message of the training itself."""
    write_circle(tmp_path, NUMBERED)
    with pytest.raises(InputError, match="train with --titles none"):
        search(Search(training=replace(TRAINING, titles="words"), budget=1), tmp_path)
    assert not (tmp_path / "tuning").exists()


def test_other_options_are_another_search(artifacts):
    """The learning rate is not searched: with another one, no result of the first search counts."""
    one = Search(training=TRAINING, space="dropout", budget=1)
    first = search(one, artifacts)
    other = search(replace(one, training=replace(TRAINING, learning_rate=0.01)), artifacts)
    assert first["folder"] != other["folder"]
    assert len(other["trials"]) == 1


def test_only_the_validation_split_is_read(artifacts, monkeypatch):
    """Removing the test items changes nothing, because the search does not read them."""
    seen = search(Search(training=TRAINING, space="dropout", budget=1), artifacts)
    load = module.load_data

    def without_test(folder):
        return replace(load(folder), test=None)

    monkeypatch.setattr(module, "load_data", without_test)
    other = replace(TRAINING, patience=TRAINING.patience + 1)  # another search of the same training
    again = search(Search(training=other, space="dropout", budget=1), artifacts)
    assert again["best"]["validation_Recall@10"] == seen["best"]["validation_Recall@10"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"space": "huge"}, "there is no space 'huge': choose one of paper"),
        ({"budget": 0}, "the budget must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        Search(training=TRAINING, **wrong)


def test_every_space_names_options_of_the_training():
    """Otherwise a search would fail at its first training."""
    for space in SPACES.values():
        assert set(space) <= set(RetrieverTraining.__dataclass_fields__)


def test_a_loss_that_is_no_number_ends_the_search(artifacts):
    """Every training of the space would fail in this way, so the error names the step and the learning rate."""
    training = replace(TRAINING, learning_rate=1e30)
    with pytest.raises(InputError, match=r"loss is .* at step .*learning rate 1e\+30"):
        search(Search(training=training, space="dropout", budget=2), artifacts)


def test_without_data_the_command_is_named(tmp_path):
    with pytest.raises(InputError, match="run `llamarec preprocess` first"):
        search(GRID, tmp_path)
    assert list(tmp_path.iterdir()) == []
