"""The similarity of titles that the ranker's results are compared with."""

import numpy as np
import pytest

from experiments.title_likeness import TitleLikeness
from models.retriever.batches import Items
from preprocessing.catalogue import Catalogue

TITLES = ["Opi Nail Lacquer, Red", "Opi Nail Lacquer, Blue", "Garlic Soap", "Rose Soap", "Comb", "Brush"]


def catalogue(titles: list[str]) -> Catalogue:
    ids = [str(number).encode() for number in range(len(titles))]
    return Catalogue(ids, titles, [1] * len(titles))


def items(*numbers: int) -> Items:
    return np.array(numbers, np.int32)


def test_titles_are_alike_by_the_words_they_share():
    """1 for the same words in any order and case, 0 for no word in common; three shared words count more than one."""
    found = TitleLikeness(catalogue([*TITLES, "lacquer: nail red OPI"]))(items(1, 2, 3), items(7, 4, 5))
    assert found.shape == (3, 3)
    assert found[0, 0] == pytest.approx(1)
    assert found[1, 0] > found[2, 1] > 0
    assert found[:, 2].tolist() == [0, 0, 0]


def test_likeness_is_the_cosine_of_tf_idf():
    """By hand, smoothed as in scikit-learn's documentation: idf = ln((1 + n) / (1 + df)) + 1, n 3 with the padding."""
    likeness = TitleLikeness(catalogue(["a b", "a c"]))
    common, rare = np.log(4 / 3) + 1, np.log(4 / 2) + 1
    assert likeness(items(1), items(2))[0, 0] == pytest.approx(common**2 / (common**2 + rare**2))
