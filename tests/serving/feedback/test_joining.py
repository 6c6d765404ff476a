"""What counts for which answer, and the three measures, worked out by hand."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answer_log import shown, write_events, write_log
from hypothesis import given
from hypothesis import strategies as st

from serving.feedback.joining import Joined, answer_values, join, last_answers
from serving.feedback.reading import read_answers, read_user_events

NDCG_OF = {place: 1 / math.log2(place + 1) for place in range(1, 21)}


def joined(folder: Path, answers: list[dict[str, Any]], events: list[tuple[str, str, float]], window=60.0) -> Joined:
    read = read_answers(write_log(folder / "log", answers))
    return join(read, read_user_events(str(write_events(folder / "events.csv", events)), read), window)


def test_what_is_taken_from_an_answer(tmp_path):
    """One answer of three items; b and c are taken, and z, which it did not show. By hand: the hit is 1 and the first
    place 2, so 1/2. NDCG has the gains of places 2 and 3, over those of 1 to 3 for the three items that the user took.
    """
    found = joined(
        tmp_path,
        [shown("ann", 0, ["a", "b", "c"], ranks=[1, 3, 0])],
        [("ann", "b", 1), ("ann", "z", 2), ("ann", "c", 3), ("ann", "b", 4)],
    )
    ndcg = (NDCG_OF[2] + NDCG_OF[3]) / (NDCG_OF[1] + NDCG_OF[2] + NDCG_OF[3])
    assert found.values.tolist() == [pytest.approx([1, 1 / 2, ndcg])]
    assert found.events.tolist() == [3]
    assert found.place.tolist() == [2, 3]
    assert found.retriever_rank.tolist() == [3, 0]


def test_an_event_counts_for_the_last_answer_before_it(tmp_path):
    """Ann sees two answers 10 s apart, and Bob one. The events: before any answer; for the first; in the same
    millisecond as the second, so for the first; for the second; after the window; of Bob, for his own answer.
    """
    answers = [shown("ann", 10, ["a", "b"]), shown("ann", 20, ["a", "b"]), shown("bob", 0, ["a", "b"])]
    events = [("ann", "a", 9), ("ann", "b", 11), ("ann", "a", 20), ("ann", "b", 80), ("ann", "a", 81), ("bob", "a", 60)]
    found = joined(tmp_path, answers, events)
    assert found.values[:, 0].tolist() == [1, 1, 1]
    assert sorted(zip(found.taken.tolist(), found.place.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 2), (2, 1)]


def test_answers_of_a_release_are_grouped_by_what_was_asked_for(tmp_path):
    """A fallback belongs to the ensemble that it stands in for; `llamarec_retrieval` asked for by itself does not."""
    fallback = {"ensemble": "llamarec_retrieval", "degraded": "Overloaded"}
    answers = [
        shown("ann", 0, ["a"]),
        shown("bob", 0, ["a"], **fallback),
        shown("eve", 0, ["a"], ensemble="llamarec_retrieval"),
        shown("joe", 0, ["a"], release="r2"),
    ]
    found = joined(tmp_path, answers, [("ann", "a", 1)])
    assert [found.groups[number] for number in found.group] == ["r1", "r1", "r1 (retrieval)", "r2"]
    assert found.fallback.tolist() == [False, True, False, False]
    assert found.ranked.tolist() == [True, False, False, True]


def test_of_an_answer_and_its_fallback_the_fallback_was_shown(tmp_path):
    """The ranker was too slow for its client and logged its answer later; requests without an id are never paired."""
    fallback = {"ensemble": "llamarec_retrieval", "degraded": "RequestTimeout"}
    answers = [
        shown("ann", 1, ["a"], request="1"),
        shown("ann", 0, ["b"], request="1", **fallback),
        shown("bob", 1, ["a"], request="1"),
        shown("eve", 0, ["a"]),
        shown("eve", 1, ["a"], **fallback),
    ]
    read = read_answers(write_log(tmp_path / "log", answers))
    assert read.replaced == 1
    assert read.rows["user"].to_pylist() == ["ann", "bob", "eve", "eve"]
    assert read.rows["items"].to_pylist() == [["b"], ["a"], ["a"], ["a"]]


def test_an_empty_answer_shows_nothing(tmp_path):
    found = joined(tmp_path, [shown("ann", 0, [])], [("ann", "a", 1)])
    assert found.values.tolist() == [[0, 0, 0]]
    assert found.events.tolist() == [1]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20)), min_size=1, max_size=12),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20)), max_size=12),
)
def test_last_answers_are_those_of_a_plain_loop(answers, events):
    """The reference looks through all answers for each event; of two in one millisecond, either is right."""
    user, time = np.array(answers).T
    event_user, event_time = np.array(events, dtype=np.int64).reshape(-1, 2).T
    found = last_answers(user, time, event_user, event_time)
    for owner, who, when in zip(found, event_user, event_time, strict=True):
        before = [moment for one, moment in answers if one == who and moment < when]
        assert (owner == -1) == (not before)
        if before:
            assert (user[owner], time[owner]) == (who, max(before))


@given(st.data(), st.integers(1, 20))
def test_the_measures_are_ordered_and_bounded(data, length):
    """0 <= MRR <= hit <= 1 and 0 <= NDCG <= 1 for any taken items; all are 1 for a list whose top is what was taken."""
    places = np.array(sorted(data.draw(st.sets(st.integers(1, length)))), dtype=np.int64)
    others = data.draw(st.integers(0, 5))
    count, answer = np.array([len(places) + others]), np.zeros(len(places), np.int64)
    hit, reciprocal, ndcg = answer_values(answer, places, count, np.array([length]))[0]
    assert hit == (len(places) > 0)
    assert reciprocal == (1 / places[0] if len(places) else 0)
    assert 0 <= ndcg <= 1 + 1e-12
    assert (ndcg > 0) == (hit > 0)
    best = answer_values(answer, np.arange(len(places)) + 1, np.array([len(places)]), np.array([length]))[0]
    assert best.tolist() == pytest.approx([hit, hit, hit])
