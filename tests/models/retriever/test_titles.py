"""The title vectors of a training: which titles are encoded, from which words are learned, and when it is refused."""

import numpy as np
import pytest
from made_up_data import COLOURED, ITEMS, NUMBERED, write_circle

from models.retriever.options import RetrieverTraining
from models.retriever.titles import all_titles, encode_titles
from models.titles.fit_words import fit_words
from models.titles.vectors import KIND, save_vectors
from preprocessing.artifacts import new_artifact
from preprocessing.data import load_data
from preprocessing.errors import InputError

UNTRAINED = ("Red Bee", "Blue Newt", "Newt")
WORDS, MODEL = (RetrieverTraining(titles=titles) for titles in ("words", "model"))


@pytest.fixture
def data(tmp_path):
    return load_data(write_circle(tmp_path, (*COLOURED, *UNTRAINED)))


def test_a_training_without_titles_has_none(data, tmp_path):
    """Nothing is encoded, and no item is added to those of the training."""
    titles = encode_titles(RetrieverTraining(), data, tmp_path)
    assert (titles.vectors, titles.encoder, titles.trained(data)) == (None, None, None)
    assert titles.retrieved(RetrieverTraining(), data) is None


def test_words_are_learned_from_trained_items_alone(data, tmp_path):
    """Every item has a vector, and the padding a row of zeros, but "newt", in two untrained titles, is no word.

    Item 31 has the title of trained item 6, and so its vector; item 33 has no known word.
    """
    titles = encode_titles(WORDS, data, tmp_path)
    assert list(titles.encoder.vocabulary) == sorted(word.lower() for word in {*" ".join(COLOURED).split()})
    expected = fit_words(COLOURED)
    vectors = expected.vectors(expected.rows(["", *COLOURED, *UNTRAINED]))
    np.testing.assert_array_equal(titles.vectors, vectors)
    assert not vectors[[0, ITEMS + 3]].any()
    assert COLOURED[5] == UNTRAINED[0]
    np.testing.assert_array_equal(vectors[ITEMS + 1], vectors[6])


def test_untrained_items_are_retrieved_if_wanted(data, tmp_path):
    """The training reads the vectors of trained items; the retrieval those of all, or of trained ones alone."""
    titles = encode_titles(WORDS, data, tmp_path)
    np.testing.assert_array_equal(titles.trained(data), titles.vectors[: ITEMS + 1])
    np.testing.assert_array_equal(titles.retrieved(WORDS, data).numpy(), titles.vectors)
    trained_only = RetrieverTraining(titles="words", untrained=False)
    np.testing.assert_array_equal(titles.retrieved(trained_only, data).numpy(), titles.trained(data))


@pytest.mark.parametrize("titles", [NUMBERED, [""] * ITEMS, ["Film"] * ITEMS], ids=["numbers", "empty", "one word"])
def test_titles_without_words_in_common_are_refused(tmp_path, titles):
    """With fewer than two words in two titles each there is nothing to project; the error names both remedies."""
    data = load_data(write_circle(tmp_path, titles))
    with pytest.raises(InputError, match="train with --titles none, or give the items titles"):
        encode_titles(WORDS, data, tmp_path)


def test_a_language_models_vectors_are_read(data, tmp_path):
    """The vectors of ``titles`` are taken as they are, and there is no encoder of words."""
    vectors = np.random.default_rng(0).normal(size=(ITEMS + 4, 7)).astype(np.float32)
    with new_artifact(tmp_path / "titles", KIND, options={}, inputs={}) as partial:
        save_vectors(partial, vectors)
    titles = encode_titles(MODEL, data, tmp_path)
    np.testing.assert_array_equal(titles.vectors, vectors)
    assert titles.encoder is None


def test_titles_are_in_the_order_of_the_item_numbers(data):
    assert all_titles(data) == [*COLOURED, *UNTRAINED]
