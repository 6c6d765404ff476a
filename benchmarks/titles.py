"""How alike titles are: what the ranker has to beat. No part of it."""

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer

from models.ranker.examples.sampling import Items
from preprocessing.catalogue import Catalogue


class TitleNearness:
    """Cosine of the titles' words, rare ones weighing more (TF-IDF): 1 for the same words, 0 where none is shared."""

    def __init__(self, catalogue: Catalogue) -> None:
        """Args:
        catalogue: its trained items are compared.
        """
        titles = [catalogue.title(item) for item in range(1, catalogue.trained + 1)]
        # One-letter words count too; a catalogue without a single word has no likeness.
        self._rows = TfidfVectorizer(token_pattern=r"\w+").fit_transform(["padding", *titles])  # [items + 1, words]

    def __call__(self, items: Items, others: Items) -> NDArray[np.float64]:
        """Of each of ``items`` [a] to each of ``others`` [b]: [a, b]."""
        near: NDArray[np.float64] = (self._rows[items] @ self._rows[others].T).toarray()
        return near
