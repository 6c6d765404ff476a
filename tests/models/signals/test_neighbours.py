"""Items nearest to an item: both signals and their sum by hand, and as the retrieval stage computes them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from retrieval import random_signals, weights

from models.signals.likeness import TitleLikeness
from models.signals.neighbours import NeighbourSearch, TitleIndex, Weights
from models.signals.signals import SIGNALS
from models.sparse import SparseRows
from models.titles.fit_words import fit_words
from models.titles.words import WordEncoder

ITEMS = 60
RANDOM = random_signals(ITEMS, 1, pool=10)
"""Transitions of 80 random sequences, titles of one to four of ten words."""


def rows(*titles: dict[int, float]) -> SparseRows:
    """Return a matrix from the entries of its rows."""
    offsets = np.cumsum([0, *map(len, titles)])
    columns, values = ([value for row in titles for value in part(row)] for part in (dict.keys, dict.values))
    return SparseRows(offsets, np.array(columns, np.int32), np.array(values, np.float32))


def by_hand(by: Weights = Weights(1.0, 1.0)) -> NeighbourSearch:  # noqa: B008 - never changed
    """Return items 1 to 5. Item 2 followed item 1 three times, item 3 once and item 1 itself twice.

    The titles over two words are (1, 0), none, (0, 1), (.6, .8) and (1, 0).
    """
    titles = rows({}, {0: 1.0}, {}, {1: 1.0}, {0: 0.6, 1: 0.8}, {0: 1.0})
    return NeighbourSearch(rows({}, {1: 2.0, 2: 3.0, 3: 1.0}, {}, {}, {}, {}), TitleIndex.of(titles), by)


def found(search: NeighbourSearch, item: int, k: int = 10, hidden: tuple[int, ...] = ()) -> list[tuple]:
    return list(zip(*(column.tolist() for column in search(item, k, hidden)), strict=True))


def close(*expected: tuple) -> list[tuple]:
    return [(item, *map(pytest.approx, signals)) for item, *signals in expected]


def test_both_signals_by_hand():
    """Item 2 by log(1 + 3), 5 by the same title, 3 by log(1 + 1), 4 by .6; never the item itself."""
    expected = [(2, np.log(4), np.log(4), 0), (5, 1, 0, 1), (3, np.log(2), np.log(2), 0), (4, 0.6, 0, np.float32(0.6))]
    assert found(by_hand(), 1) == close(*expected)
    assert found(by_hand(), 1, k=2) == close(*expected[:2])
    assert found(by_hand(), 1, hidden=(2, 5)) == close(expected[2], expected[3])


def test_the_weights_decide():
    """Titles count ten times as much, then not at all: an item that has nothing else then comes last, with score 0."""
    ten = found(by_hand(Weights(1.0, 10.0)), 1)
    assert [(item, score) for item, score, _, _ in ten][:2] == close((5, 10), (4, 6))
    none = found(by_hand(Weights(2.0, 0.0)), 1)
    expected = close((2, 2 * np.log(4)), (3, 2 * np.log(2)), (5, 0), (4, 0))
    assert [(item, score) for item, score, _, _ in none] == expected


def test_items_like_nothing_are_not_found():
    """Item 2 has no title and nothing followed it; item 3 shares a word with item 4 alone."""
    assert found(by_hand(), 2) == []
    assert found(by_hand(), 3) == close((4, 0.8, 0, np.float32(0.8)))
    assert found(by_hand(), 77) == []


def test_equal_scores_are_ordered_by_number():
    titles = TitleIndex.of(rows({}, *[{0: 1.0}] * 5))
    assert [item for item, *_ in found(NeighbourSearch(None, titles, Weights(1.0, 1.0)), 3)] == [1, 2, 4, 5]


def test_an_added_item_is_found_by_its_title_and_finds_others():
    """Number 6 has the title of item 3; 7 stands for nothing; 8 has that of item 4."""
    search = by_hand().with_added(rows({1: 1.0}, {}, {0: 0.6, 1: 0.8}), 6)
    likeness = [(item, titles) for item, _, _, titles in found(search, 3)]
    assert likeness == close((6, 1), (4, np.float32(0.8)), (8, np.float32(0.8)))
    assert [(item, titles) for item, _, _, titles in found(search, 8)][:1] == close((4, 1))
    assert found(search, 7) == []
    assert {item for item, *_ in found(search, 6, hidden=(3,))} == {4, 8}


@pytest.mark.parametrize("missing", ["transitions", "titles"])
def test_one_signal_alone_is_used(missing):
    one = replace(by_hand(), **{missing: None})
    expected = {"transitions": [5, 4], "titles": [2, 3]}
    assert [item for item, *_ in found(one, 1)] == expected[missing]


@given(item=st.integers(1, ITEMS))
def test_the_signals_are_those_of_the_retrieval_stage(item):
    """To the history of the item alone: its transitions, and each likeness of titles, to the last bit."""
    statistics = RANDOM.statistics
    search = NeighbourSearch(
        statistics.transitions.edges, TitleIndex.of(statistics.likeness.rows), Weights.of(RANDOM.weights)
    )
    nearest = search(item, ITEMS)
    signals = statistics.signals(np.array([item], np.int32), nearest.items)
    by_name = dict(zip(SIGNALS, signals.T, strict=True))
    assert nearest.transitions.tolist() == by_name["transitions"].tolist()
    for name in ("likeness_mean", "likeness_max", "likeness_last"):
        assert nearest.titles.tolist() == by_name[name].astype(np.float32).tolist()
    without = {**RANDOM.weights, "popularity": 0.0, "co_occurrence": 0.0}
    expected = [sum(without[name] * by_name[name][place] for name in SIGNALS) for place in range(len(nearest.items))]
    np.testing.assert_allclose(nearest.scores, expected, rtol=1e-6)
    assert (np.diff(nearest.scores) <= 0).all()
    everything = np.arange(1, ITEMS + 1, dtype=np.int32)
    all_signals = statistics.signals(np.array([item], np.int32), everything)
    related = {int(number) for number in everything if all_signals[number - 1, 1:-1].any()} - {item}
    assert set(nearest.items.tolist()) == related


def test_weights_of_a_stage():
    """The three likenesses of two titles are one number, so their weights add up; of two zeros nothing is left."""
    stage = weights([1.0], likeness_mean=0.25, likeness_max=0.5, likeness_last=1.0, transitions=2.0)
    assert Weights.of(stage) == (2.0, 1.75)
    assert Weights.of(weights([1.0], transitions=2.0)) == (2.0, 0.0)
    assert Weights.of(weights([1.0], popularity=3.0)) == (1.0, 1.0)


def test_an_encoder_without_its_projection_encodes_the_same_words(tmp_path: Path):
    encoder = fit_words(["star wars", "star trek", "the wars"])
    encoder.save(tmp_path)
    whole, light = WordEncoder.load(tmp_path), WordEncoder.load(tmp_path, dense=False)
    assert light.components.size == 0 < whole.components.size
    for part, other in zip(light.rows(["star wars", ""]), whole.rows(["star wars", ""]), strict=True):
        assert part.tolist() == other.tolist()


def test_likeness_is_that_of_the_signal():
    """A look-up through the index gives what the comparison of all titles gives, for an added title too."""
    titles = RANDOM.statistics.likeness.rows
    index = TitleIndex.of(titles)
    items, values = index.like(*titles.row(5)[1:])
    everything = np.arange(ITEMS + 1, dtype=np.int32)
    expected = TitleLikeness(titles)(everything, np.array([5], np.int32))[:, 0]
    assert items.tolist() == np.flatnonzero(expected).tolist()
    assert values.tolist() == expected[items].tolist()
