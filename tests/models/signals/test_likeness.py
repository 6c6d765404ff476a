"""Title likeness: cosine similarity of TF-IDF, compared with scikit-learn's."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics.pairwise import cosine_similarity

from models.signals.likeness import TitleLikeness
from models.titles.fit_words import fit_words
from models.titles.words import terms

words = st.sampled_from(["red", "fox", "owl", "hen", "the", "千寻", "blue", "2"])
titles_of = st.lists(st.lists(words, max_size=5).map(" ".join), min_size=1, max_size=10)


def likeness_of(titles: list[str]) -> TitleLikeness:
    """Return the likeness of items 1, 2, ... with these titles."""
    return TitleLikeness(fit_words(titles, dimensions=0).rows(["", *titles]))


@settings(max_examples=60, deadline=None)
@given(titles_of, st.data())
def test_it_is_the_cosine_of_tf_idf(titles, data):
    """The reference is scikit-learn's TF-IDF and cosine similarity, for any items in any order, and the padding."""
    titles = [*titles, "red", "red"]  # so that there is a word in two titles
    weights = TfidfVectorizer(analyzer=terms, sublinear_tf=True, min_df=2).fit(titles).transform(["", *titles])
    numbers = st.integers(0, len(titles))
    items = np.array(data.draw(st.lists(numbers, max_size=8)), np.int32)
    others = np.array(data.draw(st.lists(numbers, max_size=8)), np.int32)
    found = likeness_of(titles)(items, others)
    assert (found.shape, found.dtype) == ((len(items), len(others)), np.float32)
    np.testing.assert_allclose(found, cosine_similarity(weights)[np.ix_(items, others)], atol=1e-6)


def test_bounds_by_hand():
    """1 for the same words in the same order, 0 for no word in common, and rarer words weigh more.

    Items 1 and 2 share two words; item 4 shares its rare word with item 5 and its frequent one with item 6.
    """
    likeness = likeness_of(["red fox", "Red Fox!", "owl", "hen red", "hen", "red", "red", "owl"])
    found = likeness(np.array([1, 4], np.int32), np.array([2, 3, 5, 6], np.int32))
    assert found[0, :2].tolist() == pytest.approx([1, 0], abs=1e-6)
    assert 0 < found[1, 3] < found[1, 2] < 1


def test_items_beyond_the_titles_are_like_nothing():
    """An item that came into the catalogue after the signals were counted has no title here, and no likeness."""
    likeness = likeness_of(["red fox", "red fox"])
    found = likeness(np.array([1, 3, 99], np.int32), np.array([2, 3], np.int32))
    np.testing.assert_allclose(found, [[1, 0], [0, 0], [0, 0]], atol=1e-6)


def test_a_catalogue_without_words_in_common_is_like_nothing():
    """Without a word in two titles there is no vocabulary, and every similarity is 0."""
    assert not likeness_of(["one", "two", "three"])(np.array([1, 2, 3]), np.array([1, 2])).any()
