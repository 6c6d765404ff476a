"""Fits the encoder of titles by their words, with scikit-learn."""

from collections.abc import Sequence

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from models.titles.words import WordEncoder, terms

DIMENSIONS = 256
"""Maximum number of dimensions of a title's vector."""
LEAST_TITLES = 2
"""Minimum number of titles that contain a word of the vocabulary."""


def fit_words(titles: Sequence[str], dimensions: int = DIMENSIONS) -> WordEncoder:
    """Return an encoder fitted to titles: TF-IDF of words and word pairs, and its truncated SVD.

    A catalogue with fewer words or titles than ``dimensions`` gets fewer dimensions. If no word occurs in two titles,
    the vocabulary is empty, and every title is encoded as zeros.

    Args:
        titles: the titles to learn words and their frequencies from.
        dimensions: maximum number of dimensions; with 0, the encoder has no projection.
    """
    nothing = np.zeros((0, 0), np.float32)
    vectorizer = TfidfVectorizer(analyzer=lambda title: list(terms(title)), min_df=1, sublinear_tf=True)
    try:
        vectorizer.set_params(min_df=min(LEAST_TITLES, len(titles)))
        rows = vectorizer.fit_transform(titles)
    except ValueError:  # no word occurs often enough, and scikit-learn has no narrower error
        return WordEncoder([], np.zeros(0, np.float32), nothing)
    kept = min(dimensions, rows.shape[1] - 1, rows.shape[0] - 1)
    components = np.zeros((rows.shape[1], 0), np.float32)
    if kept > 0:
        # A fixed seed: trainings that differ in their own seed share the vectors of the titles.
        with np.errstate(invalid="ignore"):  # scikit-learn divides by the variance, which is 0 if all titles are equal
            components = TruncatedSVD(kept, random_state=0).fit(rows).components_.T.astype(np.float32)
    return WordEncoder(vectorizer.get_feature_names_out().tolist(), vectorizer.idf_.astype(np.float32), components)
