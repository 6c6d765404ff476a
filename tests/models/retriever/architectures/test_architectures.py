"""Invariants of every retriever: padding changes nothing, the future is not visible, and ONNX equals PyTorch."""

import shutil
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from retrieval import alone, random_model

from export.onnx_graph import export_retriever
from llamarec_client.contract import ITEM_ID, RETRIEVER_RANK
from models.retriever.architectures.build import MODELS
from models.retriever.batches import pad_left
from models.retriever.candidates import top_candidates
from models.retriever.inference.onnx_retriever import MODEL, STATE_MODEL, OnnxRetriever
from models.retriever.options import RetrieverTraining
from models.retriever.trained import TrainedModel
from preprocessing.catalogue import ITEMS_FILE, Catalogue
from preprocessing.errors import InputError
from serving.contract import EXCLUDED_ITEM, GIVEN_ITEM, HISTORY_ITEM, LIMIT, RETRIEVE
from serving.steps.retriever import RetrieverStep

ITEMS, LENGTH = 50, 13
OPTIONS = {name: RetrieverTraining(model=name, width=16, blocks=2, heads=2, max_length=LENGTH) for name in MODELS}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in ("lrurec", "sasrec") else pytest.mark.thorough) for name in MODELS],
)
def model(request):
    return random_model(OPTIONS[request.param], ITEMS).model


def stage_of(model):
    """Return a retrieval stage of this model without signals; the export reads the length from its options."""
    return alone(TrainedModel(model, RetrieverTraining(max_length=LENGTH), ITEMS))


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """Return the folder that the retriever's step reads."""
    folder = tmp_path_factory.mktemp("exported")
    export_retriever(stage_of(model), folder)
    ids = [str(item) for item in range(1, ITEMS + 1)]
    Catalogue([raw.encode() for raw in ids], ids, [1] * ITEMS).write(folder / ITEMS_FILE)
    return folder


@pytest.fixture(scope="module")
def onnx_session(exported):
    return onnxruntime.InferenceSession(exported / MODEL)


def scores(model, histories, length):
    with torch.no_grad():
        return model.score(model(torch.from_numpy(pad_left(histories, length)))[:, -1])


histories = st.lists(st.integers(1, ITEMS), min_size=1, max_size=LENGTH)


@settings(max_examples=30, deadline=None)
@given(histories)
def test_padding_never_changes_the_scores(model, history):
    """The least and the most padding give the same logits; one place is left free for BERT4Rec's mask."""
    history = np.array(history[: LENGTH - 1])
    short = scores(model, [history], len(history) + 1)
    torch.testing.assert_close(short, scores(model, [history], LENGTH), atol=1e-4, rtol=0)


@settings(max_examples=30, deadline=None)
@given(histories, histories)
def test_scores_do_not_depend_on_the_batch(model, one, other):
    """A history has the same scores alone and in a batch with another history."""
    one, other = np.array(one), np.array(other)
    together = scores(model, [one, other], LENGTH)[0]
    torch.testing.assert_close(together, scores(model, [one], LENGTH)[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("model", [name for name in MODELS if name != "bert4rec"], indirect=True)
@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, ITEMS), min_size=LENGTH, max_size=LENGTH), st.integers(1, LENGTH - 1), st.integers(1, ITEMS)
)
def test_the_future_is_unseen(model, history, place, item):
    """Another item at a place changes no state before it; BERT4Rec is exempt, because it reads both ways."""
    items = torch.tensor([history, [*history[:place], item, *history[place + 1 :]]])
    with torch.no_grad():
        states = model(items)[:, :place]
    torch.testing.assert_close(states[0], states[1], atol=1e-5, rtol=0)


def test_the_order_of_the_history_matters(model):
    """The same items with the last two swapped have other scores."""
    one, other = np.array([3, 9, 4, 7]), np.array([3, 9, 7, 4])
    assert not torch.allclose(scores(model, [one], LENGTH), scores(model, [other], LENGTH), atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(1, ITEMS), max_size=2 * LENGTH), min_size=1, max_size=9))
def test_onnx_equals_pytorch(model, onnx_session, histories):
    """For any batch size and any history, even an empty one, the exported graph gives PyTorch's logits within 1e-4."""
    rows = [np.array(history, np.int32) for history in histories]
    expected = scores(model, rows, LENGTH).numpy()
    found = onnx_session.run(None, {"items": pad_left(rows, LENGTH)})[0]
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


NOTHING = np.empty(0, np.int32)
HISTORIES = {
    "empty": NOTHING,
    "one item": np.array([7], np.int32),
    "an item again and again": np.array([7, 9, 7, 7], np.int32),
    "as long as the model reads": np.arange(3, 3 + LENGTH, dtype=np.int32),
    "longer than the model reads": np.arange(50, 50 - 2 * LENGTH, -1, dtype=np.int32),
}


@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES.keys())
def test_the_step_answers_what_pytorch_does(model, exported, history):
    """The retriever's step on the exported files returns PyTorch's top 20, with history and excluded item masked."""
    excluded = np.array([11], np.int32)
    request = {HISTORY_ITEM: history, EXCLUDED_ITEM: excluded, GIVEN_ITEM: NOTHING, RETRIEVE: [1], LIMIT: [0]}
    answer = RetrieverStep.load(exported).answer(request)
    row = scores(model, [history], LENGTH)[0].numpy()
    expected = top_candidates(row, np.append(history, excluded), 20)
    assert [int(raw) for raw in answer[ITEM_ID]] == expected.items.tolist()
    assert answer[RETRIEVER_RANK].tolist() == list(range(1, len(expected.items) + 1))


def test_given_candidates_are_ranked_by_every_architecture(model, exported):
    """The caller's items come in PyTorch's order; the mask of the history does not apply to them."""
    history, items = np.array([7, 9], np.int32), np.array([30, 7, 2], np.int32)
    row = scores(model, [history], LENGTH)[0].numpy()
    assert OnnxRetriever.load(exported).given(history, items).items.tolist() == sorted(items, key=lambda i: -row[i])


@pytest.fixture(scope="module")
def indexed(model, exported, tmp_path_factory):
    """Return an exported folder with an index.

    The index of 50 items has 7 lists and reads all of them, so that it must be exact.
    """
    folder = tmp_path_factory.mktemp("indexed")
    export_retriever(stage_of(model), folder, index=True)
    shutil.copy(exported / ITEMS_FILE, folder)
    return folder


@pytest.mark.thorough
@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES.keys())
def test_an_index_that_reads_everything_is_exact(exported, indexed, history):
    """The index gives the items and scores of the exact search, including masks, bias and order.

    Among items with the same score it may choose others: an untrained SASRec scores all items equally for an empty
    history.
    """
    excluded = np.array([11], np.int32)
    exact = OnnxRetriever.load(exported).candidates(history, excluded)
    found = OnnxRetriever.load(indexed).candidates(history, excluded)
    if len(np.unique(exact.scores)) > 1:
        assert found.items.tolist() == exact.items.tolist()
    assert not np.intersect1d(found.items, np.append(history, excluded)).size
    assert found.ranks.tolist() == exact.ranks.tolist()
    np.testing.assert_allclose(found.scores, exact.scores, atol=1e-4)


def test_the_state_is_computed_without_the_scores(indexed):
    """A session computes every node, so the index saves time only if each node leads to the state."""
    graph = onnx.load(indexed / STATE_MODEL, load_external_data=False).graph
    read = {name for node in graph.node for name in node.input} | {"state"}
    assert not [node.op_type for node in graph.node if not read.intersection(node.output)]
    assert [output.name for output in graph.output] == ["state"]


def test_without_faiss_the_index_is_refused(model, exported, indexed, tmp_path, monkeypatch):
    """Export and loading name the package and the way without it; without an index, nothing needs faiss."""
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match=r"needs faiss.*llamarec\[faiss\].*without --index"):
        OnnxRetriever.load(indexed)
    with pytest.raises(InputError, match="needs faiss"):
        export_retriever(stage_of(model), tmp_path, index=True)
    assert not (tmp_path / MODEL).exists()
    OnnxRetriever.load(exported)
