"""Items that are added while the server runs, against the same items in the catalogue that was exported."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from retrieval import WORDS, random_signals

from export.onnx_graph import export_retriever, scoring_vectors
from models.retriever.architectures.build import build_model
from models.retriever.fitting.sums import PROJECTION, with_sums
from models.retriever.inference.added import TextArm
from models.retriever.inference.onnx_retriever import SECOND_TEXT_ARM, TEXT_ARM, OnnxRetriever
from models.retriever.options import RetrieverTraining
from models.retriever.stage import RetrievalStage
from models.retriever.trained import TrainedModel, TrainedRetriever
from models.signals.likeness import TitleLikeness
from models.signals.signals import Signals
from models.sparse import SparseRows
from models.titles.fit_words import fit_words

TRAINED, EXPORTED, WHOLE, POOL = 30, 40, 46, 20
"""Numbers of items that were trained, that the smaller catalogue has, and that the larger one has."""
NOTHING = np.empty(0, np.int32)
HISTORIES = (NOTHING, np.array([7, 9, 7], np.int32), np.array([35, 2], np.int32))
OPTIONS = (
    RetrieverTraining(width=16, blocks=1, max_length=9, titles="words"),
    RetrieverTraining(model="sasrec", width=16, blocks=1, max_length=7, titles="words"),
)
# Two titles of the same words would be two items of the same score, whose order depends on the last bit.
TITLES = [" ".join(words) for words in np.random.default_rng(5).permutation(list(combinations(WORDS, 3)))[:WHOLE]]
ENCODER = fit_words(TITLES[:TRAINED], dimensions=6)


class Stages(NamedTuple):
    """The same retrieval stage over the smaller and over the larger catalogue."""

    smaller: OnnxRetriever
    larger: OnnxRetriever


def title_vectors(count: int) -> torch.Tensor:
    return torch.from_numpy(ENCODER.vectors(ENCODER.rows(["", *TITLES[:count]])))


def trained_model(options: RetrieverTraining, count: int) -> tuple[TrainedModel, np.ndarray]:
    """Return a random model over the first ``count`` items, and what it learned of titles."""
    torch.manual_seed(3)
    model = build_model(options, TRAINED, title_vectors(TRAINED)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return with_sums(model, options, TRAINED, title_vectors(count)), model.state_dict()[PROJECTION].numpy()


def signals(count: int, retrievers: int) -> Signals:
    """Return random signals of the trained items; of the others only the titles are known."""
    known = random_signals(TRAINED, retrievers, POOL)
    popularity = known.statistics.popularity
    lowest = np.full(count - TRAINED, popularity[1:].min(), np.float32)
    titles = TitleLikeness(ENCODER.rows(["", *TITLES[:count]]))
    popularity = np.concatenate((popularity, lowest))
    statistics = replace(known.statistics, popularity=popularity, likeness=titles)
    return Signals(statistics, known.weights, POOL)


def exported(folder: Path, count: int, retrievers: int, *, with_signals: bool = True, index: bool = False):
    """Return the exported stage over the first ``count`` items."""
    models = [trained_model(options, count) for options in OPTIONS[:retrievers]]
    stage = RetrievalStage(signals(count, retrievers) if with_signals else None)
    folder.mkdir()
    export_retriever(TrainedRetriever([model for model, _ in models], stage), folder, index=index)
    for name, (model, projection) in zip((TEXT_ARM, SECOND_TEXT_ARM), models, strict=False):
        vectors, bias = scoring_vectors(model.model)
        (folder / name).mkdir()
        TextArm(ENCODER, projection, float(bias[1:].min()), TRAINED, vectors).save(folder / name)
    return OnnxRetriever.load(folder)


def stages(folder: Path, *arguments, **options) -> Stages:
    return Stages(*(exported(folder / str(count), count, *arguments, **options) for count in (EXPORTED, WHOLE)))


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Stages:
    """Return stages of two retrievers and signals."""
    return stages(tmp_path_factory.mktemp("both"), 2)


def assert_same(found, expected):
    assert found.items.tolist() == expected.items.tolist()
    assert found.ranks.tolist() == expected.ranks.tolist()
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("history", HISTORIES)
def test_added_items_are_retrieved_like_exported_untrained_ones(both, history):
    """Adding titles to the smaller catalogue gives the scores, candidates and ranks of the larger one's export."""
    added = both.smaller.with_added(TITLES[EXPORTED:])
    for found, expected in zip(added.scores(history), both.larger.scores(history), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert_same(added.candidates(history, NOTHING, WHOLE), both.larger.candidates(history, NOTHING, WHOLE))
    given = np.array([45, 3, 41, 30], np.int32)
    assert_same(added.given(history, given), both.larger.given(history, given))


@pytest.mark.thorough
@pytest.mark.parametrize("history", HISTORIES)
def test_added_items_are_retrieved_without_signals_too(tmp_path, history):
    smaller, larger = stages(tmp_path, 1, with_signals=False)
    found = smaller.with_added(TITLES[EXPORTED:]).candidates(history, NOTHING, WHOLE)
    assert_same(found, larger.candidates(history, NOTHING, WHOLE))


@pytest.mark.thorough
@pytest.mark.parametrize("with_signals", [False, True])
def test_added_items_compete_with_what_an_index_finds(tmp_path, with_signals):
    """The index of these few items reads all its lists, so its candidates are those of the exact search."""
    indexed = exported(tmp_path / "indexed", EXPORTED, 1, with_signals=with_signals, index=True)
    exact = exported(tmp_path / "exact", EXPORTED, 1, with_signals=with_signals)
    history, excluded = np.array([7, 41], np.int32), np.array([44, 46], np.int32)
    found, expected = (
        stage.with_added(TITLES[EXPORTED:]).candidates(history, excluded, 10) for stage in (indexed, exact)
    )
    assert_same(found, expected)
    assert not {41, 44, 46} & set(found.items.tolist())
    every = indexed.with_added(TITLES[EXPORTED:]).candidates(NOTHING, NOTHING, 20).items
    assert every.max() > EXPORTED, "otherwise the added items played no part here"


@pytest.mark.thorough
def test_an_added_item_in_a_history_is_read_as_the_most_similar_one_and_not_returned(both):
    """An added item with the title of an untrained item has its vector, so the history is read alike."""
    added = both.smaller.with_added(["", TITLES[34]])
    for found, expected in zip(
        added.scores(np.array([3, 42], np.int32)), both.smaller.scores(np.array([3, 35], np.int32)), strict=True
    ):
        np.testing.assert_array_equal(found[: EXPORTED + 1], expected)
    assert 42 not in added.candidates(np.array([3, 42], np.int32), NOTHING, WHOLE).items


@pytest.mark.thorough
def test_a_place_without_a_title_is_never_retrieved(both):
    """It belongs to an item that the catalogue knows by an earlier number; the places after it keep their numbers."""
    added = both.smaller.with_added([None, TITLES[41]])
    assert set(added.candidates(NOTHING, NOTHING, 2 * WHOLE).items.tolist()) == {*range(1, 41), 42}


@pytest.mark.thorough
def test_a_history_of_exported_items_has_the_same_bits_with_added_items(both):
    """What was added changes no score of another item."""
    for history in HISTORIES:
        before, after = both.smaller.scores(history), both.smaller.with_added(TITLES[EXPORTED:]).scores(history)
        for found, expected in zip(after, before, strict=True):
            np.testing.assert_array_equal(found[: EXPORTED + 1], expected)


def test_without_a_text_arm_the_retriever_stays_as_it_is(tmp_path):
    """The added items can then only be the caller's candidates, and come last with rank 0."""
    (model, _), folder = trained_model(OPTIONS[0], EXPORTED), tmp_path
    export_retriever(TrainedRetriever([model], RetrievalStage(signals(EXPORTED, 1))), folder)
    retriever = OnnxRetriever.load(folder)
    assert retriever.with_added(["amber"]) is retriever
    given = retriever.given(NOTHING, np.array([41, 5], np.int32))
    assert (given.items.tolist(), given.ranks.tolist()) == ([5, 41], [1, 0])


def test_sparse_rows_follow_each_other():
    """Row by row the entries of both matrices, written by hand."""
    first = SparseRows(np.array([0, 0, 2]), np.array([1, 3], np.int32), np.array([0.5, 0.25], np.float32))
    second = SparseRows(np.array([0, 1]), np.array([2], np.int32), np.array([1.0], np.float32))
    place, column, value = SparseRows.of([first, second, second.row(0)]).entries(np.array([2, 0, 1], np.int32))
    assert (place.tolist(), column.tolist(), value.tolist()) == ([0, 2, 2], [2, 1, 3], [1.0, 0.5, 0.25])
