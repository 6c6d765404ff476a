"""Windows, masks, the top candidates and the rank of the true item."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.retriever.batches import inputs_and_targets, pad_left, training_windows
from models.retriever.candidates import (
    Candidates,
    CandidateTable,
    CandidateWriter,
    given_candidates,
    place_of,
    top_candidates,
)

# Few distinct values, so that ties are common.
score_rows = st.lists(st.integers(-3, 3), min_size=2, max_size=40).map(lambda row: np.array(row, np.float32))
# Long enough for groups of 64, with few best scores.
long_rows = st.builds(
    lambda seed, items, spread: np.random.default_rng(seed).geometric(spread, items).astype(np.float32),
    st.integers(0, 1 << 30),
    st.integers(2, 2_000),
    st.floats(0.001, 0.9),
)


def test_windows_by_hand():
    """With length 3, five items (less than two windows) give the last 3; seven give windows back from the end."""
    five, seven = np.arange(1, 6, dtype=np.int32), np.arange(1, 8, dtype=np.int32)
    assert [window.tolist() for window in training_windows([five, seven], 3)] == [[3, 4, 5], [5, 6, 7], [2, 3, 4], [1]]


def test_inputs_are_the_targets_shifted_by_one():
    """By hand: the first item of a window is predicted from padding, and the last item is not an input."""
    inputs, targets = inputs_and_targets([np.array([7, 8, 9]), np.array([5])], 4)
    assert targets.tolist() == [[0, 7, 8, 9], [0, 0, 0, 5]]
    assert inputs.tolist() == [[0, 0, 7, 8], [0, 0, 0, 0]]


def test_a_full_window_has_no_first_item_twice():
    """In a window as long as the model, padding must replace the item that the shift moves to the front."""
    inputs, _ = inputs_and_targets([np.array([7, 8, 9])], 3)
    assert inputs.tolist() == [[0, 7, 8]]


@given(score_rows | long_rows, st.data())
def test_top_candidates_equal_a_full_sort(scores, data):
    """The reference is Python's sort of all unmasked items, by descending score and then by item number."""
    items = range(1, len(scores))
    masked = data.draw(st.lists(st.sampled_from(items), unique=True))
    if data.draw(st.booleans()):  # nearly everything
        masked = [item for item in items if item not in masked[:5]]
    k = data.draw(st.integers(1, 20))
    expected = sorted(set(items) - set(masked), key=lambda item: (-scores[item], item))[:k]
    found = top_candidates(scores.copy(), np.array(masked, np.int32), k)
    assert found.items.tolist() == expected
    assert found.scores.tolist() == [scores[item] for item in expected]
    assert found.ranks.tolist() == list(range(1, len(expected) + 1))


@given(score_rows)
def test_place_of_agrees_with_the_list(scores):
    """The place of each listed item is its rank in the list of all items."""
    everything = top_candidates(scores, np.empty(0, np.int32), len(scores))
    assert [place_of(scores, item) for item in everything.items] == everything.ranks.tolist()


def test_a_masked_item_has_no_place():
    """A true item in the history cannot be recommended: its place is 0, a miss for every metric."""
    scores = np.array([0, 1, 2], np.float32)
    top_candidates(scores, np.array([2], np.int32), 20)
    assert place_of(scores, 2) == 0


def test_given_candidates_by_hand():
    """Items 3 and 1 are known (scores 5 and 7); 9 is beyond the vocabulary, so it is last, with rank 0 and no score."""
    found = given_candidates(np.array([0, 7, 6, 5], np.float32), np.array([9, 3, 1], np.int32))
    assert found.items.tolist() == [1, 3, 9]
    assert found.ranks.tolist() == [1, 2, 0]
    assert found.scores.tolist() == [7.0, 5.0, -np.inf]


def test_retrieval_probabilities_by_hand():
    """Scores of ln 3, 0 and minus infinity, for an unknown item, give probabilities of 3/4, 1/4 and 0."""
    scores = np.array([np.log(3), 0, -np.inf], np.float32)
    found = Candidates(np.array([1, 2, 3], np.int32), scores, np.array([1, 2, 0], np.int32))
    np.testing.assert_allclose(found.probabilities(), [0.75, 0.25, 0.0], atol=1e-6)


def test_log_probabilities_of_the_first_by_hand():
    """Scores ln 6, ln 2, ln 1 and none: the first two are 3 and 1 of 4, and the first three 6, 2 and 1 of 9.

    An item outside the vocabulary keeps its score of minus infinity and takes nothing from the others.
    """
    scores = np.array([np.log(6), np.log(2), 0, -np.inf], np.float32)
    found = Candidates(np.array([4, 7, 2, 9], np.int32), scores, np.array([1, 2, 3, 0], np.int32))
    two, four = found.first(2), found.first(9)
    assert (two.items.tolist(), two.ranks.tolist()) == ([4, 7], [1, 2])
    np.testing.assert_allclose(np.exp(two.scores), [3 / 4, 1 / 4], rtol=1e-6)
    assert (four.items.tolist(), four.ranks.tolist()) == ([4, 7, 2, 9], [1, 2, 3, 0])
    np.testing.assert_allclose(np.exp(four.scores), [6 / 9, 2 / 9, 1 / 9, 0], rtol=1e-6)
    np.testing.assert_allclose(two.probabilities(), np.exp(two.scores), rtol=1e-6)


def test_no_candidates_and_none_in_the_vocabulary_have_no_log_probabilities():
    """An empty list stays empty, and unknown items alone keep their scores of minus infinity, without a warning."""
    nothing = Candidates(np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.int32)).first(20)
    assert [len(column) for column in nothing[:3]] == [0, 0, 0]
    unknown = Candidates(np.array([8], np.int32), np.array([-np.inf], np.float32), np.zeros(1, np.int32)).first(20)
    assert (unknown.items.tolist(), unknown.scores.tolist(), unknown.ranks.tolist()) == ([8], [-np.inf], [0])


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=30), st.integers(1, 40))
def test_log_probabilities_keep_the_order_and_sum_to_one(scores, k):
    """For any scores and any cut, however far apart the scores are."""
    descending = np.sort(np.array(scores, np.float32))[::-1]
    items = np.arange(1, len(scores) + 1, dtype=np.int32)
    found = Candidates(items, descending, items).first(k)
    assert len(found.items) == min(k, len(scores))
    assert (np.diff(found.scores) <= 0).all()
    assert np.exp(found.scores.astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)


def test_a_table_reads_back_as_written(tmp_path: Path):
    """Users with two, one and no candidates are written to Parquet in two batches and read back."""
    two, one, none = (
        top_candidates(np.array([0, 1, 2], np.float32), np.array(m, np.int32), 20) for m in ([], [2], [1, 2])
    )
    with CandidateWriter(tmp_path / "t.parquet") as writer:
        columns = ([2, 1], [1, 1], [2, 1])
        writer.write(["a", "b"], [two, one], *(np.array(column, np.int32) for column in columns))
        writer.write(["c"], [none], *(np.array([value], np.int32) for value in (1, 0, 0)))
    table = CandidateTable.read(tmp_path / "t.parquet")
    assert table.users == ["a", "b", "c"]
    assert [row.items.tolist() for row in table.candidates] == [[2, 1], [1], []]
    assert [row.scores.tolist() for row in table.candidates] == [[2.0, 1.0], [1.0], []]
    assert [row.ranks.tolist() for row in table.candidates] == [[1, 2], [1], []]
    assert (table.truth.tolist(), table.ranks.tolist()) == ([2, 1, 1], [1, 1, 0])
    assert table.model_ranks.tolist() == [2, 1, 0]


def test_a_table_of_an_earlier_version_reads(tmp_path: Path):
    """Earlier versions had no signals and no column ``model_rank``; the one rank that they wrote was the model's."""
    columns = {
        "user": pa.array(["a"], pa.string()),
        "items": pa.array([[2, 1]], pa.list_(pa.int32())),
        "scores": pa.array([[5.0, 4.0]], pa.list_(pa.float32())),
        "truth": pa.array([1], pa.int32()),
        "rank": pa.array([2], pa.int32()),
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    table = CandidateTable.read(tmp_path / "t.parquet")
    assert (table.ranks.tolist(), table.model_ranks.tolist()) == ([2], [2])
    assert table.candidates[0].scores.tolist() == [5.0, 4.0]


def test_the_file_grows_as_users_come(tmp_path: Path):
    """The writer holds one row group at most: of 5 users by twos, 4 are on the disk before it is closed."""
    row, one = top_candidates(np.zeros(2, np.float32), np.empty(0, np.int32), 20), np.array([1], np.int32)
    with CandidateWriter(tmp_path / "t.parquet", rows_at_once=2) as writer:
        for user in "abcde":
            writer.write([user], [row], one, one, one)
    groups = pq.ParquetFile(tmp_path / "t.parquet").metadata
    assert [groups.row_group(group).num_rows for group in range(groups.num_row_groups)] == [2, 2, 1]


@given(st.lists(st.lists(st.integers(1, 9), max_size=8), min_size=1, max_size=5), st.integers(1, 6))
def test_pad_left_keeps_the_last_items_at_the_end(sequences, length):
    """The reference puts zeros before the last ``length`` items, with Python lists."""
    expected = [[0] * (length - len(row[-length:])) + row[-length:] for row in sequences]
    assert pad_left([np.array(row, np.int32) for row in sequences], length).tolist() == expected


def test_a_negative_number_is_outside_every_vocabulary():
    """By hand: it stands for a text, and comes after the known items, in the order of the request."""
    found = given_candidates(np.array([9, 1, 3, 2], np.float32), np.array([-1, 1, 4, -2, 2], np.int32))
    assert found.items.tolist() == [2, 1, -1, 4, -2]
    assert found.scores.tolist() == [3, 1, -np.inf, -np.inf, -np.inf]
    assert found.ranks.tolist() == [1, 2, 0, 0, 0]


def test_candidates_are_compared_if_all_have_a_score():
    """One without a score takes those of the others away; the places stay."""
    items, ranks = np.array([5, 2], np.int32), np.array([1, 2], np.int32)
    scored = Candidates(items, np.array([-0.5, -1], np.float32), ranks)
    assert scored.comparable() is scored
    partly = Candidates(items, np.array([0, -np.inf], np.float32), ranks).comparable()
    assert partly.scores.tolist() == [-np.inf, -np.inf]
    assert (partly.items.tolist(), partly.ranks.tolist()) == ([5, 2], [1, 2])
