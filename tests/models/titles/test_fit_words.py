"""Fitting the encoder of titles: its dimensions, and catalogues with few, equal or no titles."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.titles.fit_words import DIMENSIONS, fit_words


@pytest.mark.parametrize(
    ("titles", "words", "dimensions"),
    [
        ([], 0, 0),
        (["", "", ""], 0, 0),
        (["One"], 1, 0),
        (["One Title"], 3, 0),  # both words and the pair, from a single title
        (["One", "Two", "Three"], 0, 0),
        (["Red", "Red", "Blue"], 1, 0),
        (["Red Fox", "Red Fox", "Red Fox", "Red Fox"], 3, 2),
        (["Red Fox", "Red Owl", "Blue Fox", "Blue Owl"], 4, 3),
        (["Red Fox", "Red Fox", "Blue Owl", "Blue Owl", "Green"], 6, 4),
    ],
)
def test_dimensions_of_small_catalogues_by_hand(titles, words, dimensions):
    """Words and pairs that occur in two titles, and one dimension less than there are words or titles, if positive.

    No catalogue fails or warns, and every title has a vector of that many finite numbers, of length 1 or 0.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder = fit_words(titles)
        vectors = encoder.vectors(encoder.rows(["", *titles]))
    assert len(encoder.vocabulary) == len(encoder.idf) == words
    assert vectors.shape == (len(titles) + 1, dimensions)
    lengths = np.linalg.norm(vectors, axis=1)
    assert (np.isclose(lengths, 1, atol=1e-5) | (lengths == 0)).all()


def test_equal_titles_have_equal_vectors():
    """In a catalogue where all titles are equal, all vectors are, and any other title has no direction of its own."""
    encoder = fit_words(["Red Fox"] * 6)
    vectors = encoder.vectors(encoder.rows(["Red Fox", "red fox!", "Owl"]))
    np.testing.assert_array_equal(vectors[0], vectors[1])
    assert np.linalg.norm(vectors[0]) == pytest.approx(1, abs=1e-5)
    assert not vectors[2].any()


def test_similar_titles_have_similar_vectors():
    """With two dimensions for two kinds of titles, those of one kind point the same way, and the kinds are orthogonal.

    The kinds share no word, so they are separate blocks of the matrix, each with a first singular vector of its own.
    """
    colours, animals = ("red", "blue", "green"), ("fox", "owl", "hen", "bee")
    titles = [f"{colour} {animal} stories" for colour in colours for animal in animals]
    titles += [f"{place} guide" for place in ("rome", "oslo", "riga")] * 2
    encoder = fit_words(titles, 2)
    red_fox, red_owl, rome = encoder.vectors(encoder.rows(["red fox stories", "red owl stories", "rome guide"]))
    assert red_fox @ red_owl == pytest.approx(1, abs=1e-5)
    assert red_fox @ rome == pytest.approx(0, abs=1e-5)


def test_the_same_titles_give_the_same_encoder():
    """Trainings with other seeds, and the retrievers of a cross-fit, share the vectors to the last bit."""
    rng = np.random.default_rng(0)
    titles = [" ".join(map(str, rng.integers(0, 200, 4))) for _ in range(400)]
    one, other = fit_words(titles, 16), fit_words(titles, 16)
    assert one.components.shape == (len(one.vocabulary), 16)
    np.testing.assert_array_equal(one.components, other.components)
    np.testing.assert_array_equal(one.idf, other.idf)


@pytest.mark.thorough
def test_at_most_256_dimensions_by_default():
    """A catalogue with more words and titles than that gets no more."""
    rng = np.random.default_rng(0)
    titles = [" ".join(map(str, rng.integers(0, 300, 3))) for _ in range(600)]
    assert fit_words(titles).components.shape[1] == DIMENSIONS == 256


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=12), max_size=12), st.integers(0, 5))
def test_any_titles_can_be_fitted(titles, dimensions):
    """Any text in any number of titles gives an encoder whose vectors are finite, with the titles' number of rows."""
    encoder = fit_words(titles, dimensions)
    vectors = encoder.vectors(encoder.rows(titles))
    assert len(vectors) == len(titles)
    assert vectors.shape[1] <= dimensions
    assert np.isfinite(vectors).all()
