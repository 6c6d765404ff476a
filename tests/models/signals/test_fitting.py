"""Counting the statistics of training sequences, and fitting the weights of signals: by hand and against loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.signals import fitting
from models.signals.fitting import (
    DISCOUNT,
    NEAR,
    REACH,
    count_co_occurrence,
    count_statistics,
    count_transitions,
    fit_weights,
)
from models.signals.signals import SIGNALS
from models.titles.fit_words import fit_words


def dense(graph, items: int) -> np.ndarray:
    """Return the edges [from, to]."""
    found = np.zeros((items + 1, items + 1))
    rows, columns, values = graph.edges.entries(np.arange(items + 1, dtype=np.int32))
    found[rows, columns] = values
    return found


def sequences_of(*users: list[int]) -> list[np.ndarray]:
    return [np.array(user, np.int32) for user in users]


def test_counts_by_hand():
    """In 1, 2, 3, 4, 5, items one step apart count 1, two steps 1/2, three steps 1/3, and four steps nothing."""
    expected = np.zeros((6, 6))
    for earlier in range(1, 6):
        for later in range(earlier + 1, min(earlier + 3, 5) + 1):
            expected[earlier, later] = 1 / (later - earlier)
    np.testing.assert_allclose(dense(count_transitions(sequences_of([1, 2, 3, 4, 5]), 5), 5), expected, rtol=1e-6)
    assert REACH == 3


def test_repeated_pairs_add_up():
    """By hand: in 1, 2, 1, 2 the pair (1, 2) is there twice at distance 1 and once at distance 3."""
    found = dense(count_transitions(sequences_of([1, 2, 1, 2]), 2), 2)
    assert found[1:, 1:].tolist() == [pytest.approx([1 / 2, 2 + 1 / 3]), pytest.approx([1, 1 / 2])]


def test_no_transition_crosses_users():
    """Two users with two items each, and users with one and with none: the last item of one is not followed by another.

    The pairs 1-2 and 3-4 are all there are.
    """
    found = dense(count_transitions(sequences_of([1, 2], [3, 4], [5], [], [6]), 6), 6)
    assert np.argwhere(found).tolist() == [[1, 2], [3, 4]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 6), max_size=9), min_size=1, max_size=6))
def test_counts_equal_a_loop(users):
    """The reference is a loop over users, positions and distances."""
    expected = np.zeros((7, 7))
    for user in users:
        for place, earlier in enumerate(user):
            for distance, later in enumerate(user[place + 1 : place + 4], start=1):
                expected[earlier, later] += 1 / distance
    transitions = count_transitions(sequences_of(*users), 6)
    np.testing.assert_allclose(dense(transitions, 6), expected, rtol=1e-6)
    assert len(transitions.edges.offsets) == 8
    assert [array.dtype for array in transitions.edges] == [np.int64, np.int32, np.float32]


def test_co_occurrences_by_hand():
    """Items 1 and 2 are twice together, in either order, and 1 and 3 once; they occur 2, 3 and 1 times.

    Item 2 is alone in the last sequence.
    """
    found = dense(count_co_occurrence(sequences_of([1, 2], [3, 2, 1], [2]), 3), 3)
    both, first_and_third, second_and_third = 2 / 6**0.75, 1 / 2**0.75, 1 / 3**0.75
    expected = [[0, both, first_and_third], [both, 0, second_and_third], [first_and_third, second_and_third, 0]]
    np.testing.assert_allclose(found[1:, 1:], expected, rtol=1e-6)
    assert (NEAR, DISCOUNT) == (30, 0.75)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 6), max_size=9), min_size=1, max_size=6), st.integers(1, 9))
def test_co_occurrences_equal_a_loop(users, near):
    """The reference is a loop over users and pairs of positions; a repeated item is near itself, twice."""
    expected, occurrences = np.zeros((7, 7)), np.zeros(7)
    for user in users:
        for place, item in enumerate(user):
            occurrences[item] += 1
            for other in (*user[max(0, place - near) : place], *user[place + 1 : place + 1 + near]):
                expected[item, other] += 1
    expected /= np.maximum(np.outer(occurrences, occurrences), 1) ** DISCOUNT
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "NEAR", near)
        graph = count_co_occurrence(sequences_of(*users), 6)
    np.testing.assert_allclose(dense(graph, 6), expected, rtol=1e-6)
    assert [array.dtype for array in graph.edges] == [np.int64, np.int32, np.float32]


def test_the_most_frequent_followers_are_kept(monkeypatch):
    """Item 5 followed item 1 three times, and 2, 3 and 4 once each: 5 and the smallest of the others stay.

    A row with no more followers than that is not changed, and each row's columns stay in ascending order.
    """
    monkeypatch.setattr(fitting, "MOST_EDGES", 2)
    users = sequences_of([1, 4], [1, 5], [1, 3], [1, 5], [1, 2], [1, 5], [2, 5], [2, 3])
    counts = count_transitions(users, 5).edges
    rows, columns, values = counts.entries(np.arange(6, dtype=np.int32))
    assert [*zip(rows.tolist(), columns.tolist(), values.tolist(), strict=True)] == [
        (1, 2, 1), (1, 5, 3), (2, 3, 1), (2, 5, 1),
    ]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 6), max_size=9), min_size=1, max_size=6), st.integers(1, 4))
def test_the_kept_followers_equal_a_sort(users, most):
    """The reference sorts each row of the whole counts by descending count and then by item number."""
    whole = dense(count_transitions(sequences_of(*users), 6), 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "MOST_EDGES", most)
        kept = dense(count_transitions(sequences_of(*users), 6), 6)
    for row, found in zip(whole, kept, strict=True):
        best = sorted(np.flatnonzero(row), key=lambda item: (-row[item], item))[:most]
        assert np.flatnonzero(found).tolist() == sorted(best)
        assert found[best].tolist() == row[best].tolist()


def test_statistics_of_a_data_set_by_hand():
    """Popularity counts the training sequences: items occur 2, 2 and 1 times, and the padding never.

    The untrained item gets the lowest popularity of a trained one.

    Words are learned from the titles of the three trained items alone: "owl", which the fourth has too, is in one.
    """
    titles = ["Red Fox", "Red Fox", "Owl", "Owl Red"]
    statistics = count_statistics(sequences_of([1, 2], [1, 3], [2]), titles, trained=3)
    np.testing.assert_allclose(statistics.popularity, np.log([1, 3, 3, 2, 2]), rtol=1e-6)
    assert statistics.popularity.dtype == np.float32
    red_fox, owl, owl_red = np.array([1], np.int32), np.array([3], np.int32), np.array([4], np.int32)
    assert statistics.likeness(owl, owl_red).tolist() == [[0]]
    expected = fit_words(titles[:3], dimensions=0).rows(titles)
    weights = np.zeros((4, 3))
    for row in range(4):
        some = slice(*expected.offsets[row : row + 2])
        weights[row, expected.columns[some]] = expected.values[some]
    assert statistics.likeness(red_fox, owl_red)[0, 0] == pytest.approx(weights[0] @ weights[3])
    assert weights[0] @ weights[3] > 0
    assert dense(statistics.transitions, 4)[1].tolist() == [0, 0, 1, 1, 0]
    assert dense(statistics.co_occurrence, 4)[2].tolist() == pytest.approx([0, 1 / 4**0.75, 0, 0, 0])


def test_the_trainings_own_encoder_is_used():
    """With the titles' vectors of a training, likeness has that encoder's words, and nothing is fitted again."""
    encoder = fit_words(["Owl", "Owl"], 1)
    statistics = count_statistics(sequences_of([1, 2]), ["Red Fox", "Red Fox", "Owl"], 2, encoder)
    fox, owl = np.array([1], np.int32), np.array([3], np.int32)
    assert statistics.likeness(fox, fox).tolist() == [[0]]
    assert statistics.likeness(owl, owl).tolist() == [[pytest.approx(1)]]


def test_weights_are_named_in_the_order_of_the_sources():
    """A source that scores every true item highest gets weight, and one that is constant gets none.

    The columns are one or two retrievers and then the signals.
    """
    for retrievers, names in ((1, ("retriever", *SIGNALS)), (2, ("retriever", "second_retriever", *SIGNALS))):
        for helpful, name in enumerate(names):
            pool = np.zeros((3, len(names)))
            pool[1, helpful] = 1.0
            found = fit_weights([pool] * 5, [1] * 5, retrievers)
            assert tuple(found) == names
            assert found[name] > 1
            assert all(weight == 0 for other, weight in found.items() if other != name)
            assert all(type(weight) is float for weight in found.values())


def test_without_a_user_the_first_retrievers_order_is_kept():
    """If no pool has a true item there is nothing to fit: the first retriever has weight 1, everything else 0."""
    found = fit_weights([], [], 2)
    assert found == {"retriever": 1.0, "second_retriever": 0.0, **dict.fromkeys(SIGNALS, 0.0)}
