"""Similarity of titles by their words, a baseline for the ranker; the ranker does not use it."""

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer

from models.retriever.batches import Items
from preprocessing.catalogue import Catalogue


class TitleLikeness:
    """Cosine similarity of titles by TF-IDF: 1 for the same words, 0 for no word in common; rare words weigh more.

    Args:
        catalogue: its trained items are compared.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        titles = [catalogue.title(item) for item in range(1, catalogue.trained + 1)]
        # The pattern keeps words of one letter; "padding" takes item 0, and keeps a catalogue without words valid.
        self._rows = TfidfVectorizer(token_pattern=r"\w+").fit_transform(["padding", *titles])  # [items + 1, words]

    def __call__(self, items: Items, others: Items) -> NDArray[np.float64]:
        """Return the similarity [a, b] of each of ``items`` [a] to each of ``others`` [b]."""
        similarities: NDArray[np.float64] = (self._rows[items] @ self._rows[others].T).toarray()
        return similarities
