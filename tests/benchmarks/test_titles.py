"""The likeness of titles that the ranker's results are compared with."""

import numpy as np
import pytest

from benchmarks.titles import TitleNearness
from preprocessing.catalogue import Catalogue

TITLES = ["Opi Nail Lacquer, Red", "Opi Nail Lacquer, Blue", "Garlic Soap", "Rose Soap", "Comb", "Brush"]


def catalogue(titles: list[str]) -> Catalogue:
    ids = [str(number).encode() for number in range(len(titles))]
    return Catalogue(ids, titles, [1] * len(titles))


def test_nearness_of_titles():
    """1 for the same words in any order and case, 0 for none in common; one shared word ties less than three."""
    near = TitleNearness(catalogue([*TITLES, "lacquer: nail red OPI"]))
    found = near(np.array([1, 2, 3]), np.array([7, 4, 5]))
    assert found.shape == (3, 3)
    assert found[0, 0] == pytest.approx(1)
    assert found[1, 0] > found[2, 1] > 0
    assert found[:, 2].tolist() == [0, 0, 0]


def test_nearness_is_the_cosine_of_tf_idf():
    """By hand, smoothed as in scikit-learn's documentation: idf = ln((1 + n) / (1 + df)) + 1, n 3 with the padding."""
    near = TitleNearness(catalogue(["a b", "a c"]))
    common, rare = np.log(4 / 3) + 1, np.log(4 / 2) + 1
    assert near(np.array([1]), np.array([2]))[0, 0] == pytest.approx(common**2 / (common**2 + rare**2))
