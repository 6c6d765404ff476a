"""The exported stage against the trained one, with signals, a second retriever and an approximate index."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from retrieval import alone, random_model, random_signals

from export.onnx_graph import export_retriever
from models.retriever.inference.onnx_retriever import (
    INDEX,
    MODEL,
    SECOND_MODEL,
    SETTINGS,
    STATE_MODEL,
    OnnxRetriever,
)
from models.retriever.options import RetrieverTraining
from models.retriever.stage import RetrievalStage, rank_in
from models.retriever.trained import TrainedRetriever
from preprocessing.errors import InputError

ITEMS, LENGTH, SECOND_LENGTH, POOL = 50, 13, 9, 25
NOTHING = np.empty(0, np.int32)
HISTORIES = {
    "empty": NOTHING,
    "one item": np.array([7], np.int32),
    "an item again and again": np.array([7, 9, 7, 7], np.int32),
    "longer than the models read": np.arange(50, 50 - 2 * LENGTH, -1, dtype=np.int32),
    "all but ten items": np.arange(11, ITEMS + 1, dtype=np.int32),
    "everything": np.arange(1, ITEMS + 1, dtype=np.int32),
}
every_history = pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES.keys())

FIRST = random_model(RetrieverTraining(width=16, blocks=1, max_length=LENGTH), ITEMS)
SECOND = random_model(RetrieverTraining(model="sasrec", width=16, blocks=1, max_length=SECOND_LENGTH), ITEMS, seed=8)
BOTH = TrainedRetriever([FIRST, SECOND], RetrievalStage(random_signals(ITEMS, 2, POOL)))
ONE = TrainedRetriever([FIRST], RetrievalStage(random_signals(ITEMS, 1, POOL)))


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """Return the folder of the stage with two retrievers and signals."""
    folder = tmp_path_factory.mktemp("exported")
    export_retriever(BOTH, folder)
    return folder


@pytest.fixture(scope="module")
def indexed(tmp_path_factory) -> Path:
    """Return the folder of the stage with one retriever, signals and an index of 7 lists, all of which it reads."""
    folder = tmp_path_factory.mktemp("indexed")
    export_retriever(ONE, folder, index=True)
    return folder


@pytest.fixture(scope="module")
def retriever(exported) -> OnnxRetriever:
    return OnnxRetriever.load(exported)


def assert_equal(found, expected):
    """Items and ranks are equal, and scores agree within 1e-4."""
    assert found.items.tolist() == expected.items.tolist()
    assert found.ranks.tolist() == expected.ranks.tolist()
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)


def rows_of(trained, history):
    (rows,) = trained.rows([history])
    return [row.copy() for row in rows]


def test_the_folder_has_what_the_stage_needs(exported):
    """Both graphs with their weights, the signals, and both lengths, which differ."""
    assert {path.name for path in exported.iterdir()} == {
        *(MODEL, f"{MODEL}.data", SECOND_MODEL, f"{SECOND_MODEL}.data"),
        *("signals.json", "signals.safetensors", SETTINGS),
    }
    settings = json.loads((exported / SETTINGS).read_text())
    assert settings == {
        "length": LENGTH,
        "second_length": SECOND_LENGTH,
        "threads": 1,
        "index": False,
        "candidates": 20,
    }


@every_history
def test_candidates_equal_the_trained_stages(retriever, history):
    """In PyTorch and in ONNX Runtime the same items come in the same order, with the same log-probabilities."""
    (expected,) = BOTH.retrieve([history], 20)
    assert_equal(retriever.candidates(history, NOTHING), expected)


@every_history
def test_excluded_items_are_masked_in_both_retrievers(retriever, history):
    """Items outside the vocabulary may be excluded too, as those that came into the catalogue after the training."""
    excluded = np.array([3, 11, ITEMS, ITEMS + 1, ITEMS + 400], np.int32)
    masked = np.concatenate((history, excluded[:3]))
    expected = BOTH.stage.candidates(rows_of(BOTH, history), history, masked, 20)
    found = retriever.candidates(history, excluded)
    assert_equal(found, expected)
    assert not set(found.items.tolist()) & set(masked.tolist())


@every_history
def test_given_candidates_equal_the_trained_stages(retriever, history):
    """The caller's items, of which one is in some histories and one is outside the vocabulary."""
    items = np.array([30, ITEMS + 3, 7, 2, 49], np.int32)
    expected = BOTH.stage.given(rows_of(BOTH, history), history, items)
    found = retriever.given(history, items)
    assert_equal(found, expected)
    assert found.items[-1] == ITEMS + 3


@every_history
def test_ranks_equal_the_trained_stages(retriever, history):
    """The rank of every item, inside the pool and outside it; 0 for an item in the history."""
    rows = rows_of(BOTH, history)
    ordered = BOTH.stage.ordered(rows, history, history, 20)
    expected = [rank_in(ordered, rows[0], item) for item in range(1, ITEMS + 1)]
    found = [retriever.rank(history, item) for item in range(1, ITEMS + 1)]
    assert found == expected
    assert sorted(rank for rank in found if rank) == list(range(1, ITEMS - len(set(history.tolist())) + 1))


def test_an_answer_does_not_depend_on_the_number_of_candidates(retriever):
    """The first five of twenty are the five, with log-probabilities among themselves."""
    history = HISTORIES["one item"]
    five, twenty = retriever.candidates(history, NOTHING, 5), retriever.candidates(history, NOTHING)
    assert five.items.tolist() == twenty.items[:5].tolist()
    np.testing.assert_array_equal(five.scores, twenty.first(5).scores)


class Counted:
    """An ONNX session that runs elsewhere, as in Triton's ONNX Runtime backend, and is asked for its scores."""

    def __init__(self, graph: Path) -> None:
        self.session, self.asked = onnxruntime.InferenceSession(graph), 0

    def run(self, outputs, feeds):
        assert outputs == ["scores"]
        self.asked += 1
        return self.session.run(outputs, feeds)


def test_the_first_graph_may_run_elsewhere(exported, retriever):
    """The second one and the signals are computed in this process all the same, and the answer does not change."""
    served = Counted(exported / MODEL)
    elsewhere = OnnxRetriever.load(exported, served)
    history = HISTORIES["one item"]
    assert_equal(elsewhere.candidates(history, NOTHING), retriever.candidates(history, NOTHING))
    assert served.asked == 1


# --- with an index


@pytest.fixture(scope="module")
def exact(indexed, tmp_path_factory) -> OnnxRetriever:
    """Return the retriever on the same files without the index."""
    folder = tmp_path_factory.mktemp("exact")
    shutil.copytree(indexed, folder, dirs_exist_ok=True)
    settings = json.loads((folder / SETTINGS).read_text())
    (folder / SETTINGS).write_text(json.dumps({**settings, "index": False}))
    return OnnxRetriever.load(folder)


@every_history
def test_an_index_that_reads_everything_is_exact(indexed, exact, history):
    """The signals reorder the index's pool as they do the exact one; masked items never appear.

    With ten items or none left, the index finds fewer than the pool of 25, and all items are scored.
    """
    retriever, excluded = OnnxRetriever.load(indexed), np.array([11, ITEMS + 2], np.int32)
    found = retriever.candidates(history, excluded)
    assert_equal(found, exact.candidates(history, excluded))
    assert not set(found.items.tolist()) & {11, *history.tolist()}
    scored = ONE.stage.candidates(rows_of(ONE, history), history, np.append(history, np.int32(11)), 20)
    assert_equal(found, scored)


def test_the_index_spares_the_scores(indexed, monkeypatch):
    """Where it finds a whole pool, no other item is scored."""
    retriever = OnnxRetriever.load(indexed)
    asked = []
    graph = type(retriever.graphs[0])
    run = graph.run
    monkeypatch.setattr(graph, "run", lambda self, names, history: asked.extend(names) or run(self, names, history))
    assert len(retriever.candidates(HISTORIES["one item"], NOTHING).items) == 20
    assert asked == ["state"]
    asked.clear()
    assert len(retriever.candidates(HISTORIES["all but ten items"], NOTHING).items) == 10
    assert asked == ["state", "scores"]


def test_an_index_has_its_own_files(indexed):
    """The index and the graph of its queries are written too, and named in the settings."""
    assert {INDEX, STATE_MODEL, "signals.json"} <= {path.name for path in indexed.iterdir()}
    assert json.loads((indexed / SETTINGS).read_text()) == {
        "length": LENGTH,
        "threads": 1,
        "index": True,
        "candidates": 20,
    }


def test_an_index_with_a_second_retriever_is_refused(tmp_path):
    """The index has the items of one retriever: nothing is written, and the error names both ways out."""
    with pytest.raises(InputError, match=r"trained with a second: export without --index, or train without --second"):
        export_retriever(BOTH, tmp_path, index=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.thorough
def test_a_stage_without_signals_exports_none(tmp_path):
    """The folder is that of earlier versions: the graph with its weights, and the settings."""
    export_retriever(alone(FIRST), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {MODEL, f"{MODEL}.data", SETTINGS}
    assert OnnxRetriever.load(tmp_path).stage.signals is None
