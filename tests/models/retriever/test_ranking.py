"""Many users at once: the same candidates and places as one at a time, in bounded memory."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.retriever import ranking
from models.retriever.candidates import CandidateTable, place_of, top_candidates
from models.retriever.lrurec import LRURec
from models.retriever.ranking import mask, places_of, rank_users, score_histories, top_of_each, write_candidates

ITEMS = 12


@st.composite
def users(draw):
    """Scores [users, items + 1] of few distinct values, so that ties are common, and a history for each."""
    rows = draw(st.lists(st.lists(st.integers(-2, 2), min_size=ITEMS + 1, max_size=ITEMS + 1), min_size=1, max_size=4))
    histories = [draw(st.lists(st.integers(1, ITEMS), max_size=2 * ITEMS)) for _ in rows]
    return np.array(rows, np.float32), [np.array(items, np.int32) for items in histories]


@given(users(), st.integers(1, ITEMS + 3))
def test_top_of_each_equals_one_at_a_time(some, k):
    """Items, order and scores are those of `top_candidates`, whose own reference is a full sort; then 0 and -inf."""
    scores, histories = some
    items, values = top_of_each(mask(torch.from_numpy(scores.copy()), histories), k)
    for row, history, found, logits in zip(scores, histories, items, values, strict=True):
        expected = top_candidates(row, history, k)
        left = len(expected.items)
        assert found[:left].tolist() == expected.items.tolist()
        assert logits[:left].tolist() == expected.scores.tolist()
        assert not found[left:].any()
        assert np.isneginf(logits[left:]).all()


@given(users(), st.data())
def test_places_of_equals_one_at_a_time(some, data):
    """The place of any item, masked ones included, is that of `place_of`."""
    scores, histories = some
    truth = np.array([data.draw(st.integers(1, ITEMS)) for _ in histories], np.int32)
    found = places_of(mask(torch.from_numpy(scores), histories), truth)
    assert found.tolist() == [place_of(row, item) for row, item in zip(scores, truth, strict=True)]


def test_scores_that_are_all_equal_go_by_item_number():
    """By the rule of ties: the first items that are not masked."""
    scores = mask(torch.zeros(1, ITEMS + 1), [np.array([1, 3], np.int32)])
    assert top_of_each(scores, 4)[0].tolist() == [[2, 4, 5, 6]]


@pytest.fixture
def model():
    torch.manual_seed(3)
    return LRURec(ITEMS, width=8, blocks=1)


def test_batches_change_nothing(model, monkeypatch, tmp_path: Path):
    """By twos, the last batch smaller, the file and the ranks are those of one batch."""
    rng = np.random.default_rng(0)
    histories = [rng.integers(1, ITEMS + 1, count).astype(np.int32) for count in (3, 0, 9, 1, 5)]
    truth = rng.integers(1, ITEMS + 1, 5).astype(np.int32)
    tables = []
    for at_once in (256, 2):
        monkeypatch.setattr(ranking, "USERS_AT_ONCE", at_once)
        ranks = write_candidates(tmp_path / "c.parquet", model, 6, list("abcde"), histories, truth)
        assert rank_users(model, 6, histories, truth).tolist() == ranks.tolist()
        tables.append(CandidateTable.read(tmp_path / "c.parquet"))
        assert tables[-1].ranks.tolist() == ranks.tolist()
    one, other = tables
    assert one.users == other.users == list("abcde")
    assert one.truth.tolist() == truth.tolist()
    for row, same in zip(one.candidates, other.candidates, strict=True):
        assert row.items.tolist() == same.items.tolist()
        np.testing.assert_allclose(row.scores, same.scores, atol=1e-6)


def test_everything_in_a_long_history_is_masked(model):
    """A history longer than the model reads: also what it no longer reads is never recommended."""
    history = np.array([1, 2, 3, 4, 5, 6, 7, 8], np.int32)
    (batch,) = score_histories(model, 3, [history])
    assert batch.scores[0].isneginf().nonzero().flatten().tolist() == [0, *history.tolist()]


def test_a_large_catalogue_makes_small_batches(model, monkeypatch):
    """40 scores at most at once and 13 a user: three users a batch."""
    monkeypatch.setattr(ranking, "SCORES_AT_ONCE", 40)
    batches = list(score_histories(model, 3, [np.array([1], np.int32)] * 7))
    assert [batch.users for batch in batches] == [slice(0, 3), slice(3, 6), slice(6, 7)]


PROGRAM = """
import sys
from pathlib import Path
import numpy as np, torch
from benchmarks.memory import peak_memory
from models.retriever import ranking
from models.retriever.narm import NARM
from models.retriever.ranking import write_candidates

torch.set_num_threads(1)
ranking.USERS_AT_ONCE = 64
users, items = 6_000, 30_000
model, histories = NARM(items, width=4), [np.array([1], np.int32)] * users
names, truth = [str(user) for user in range(users)], np.full(users, 2, np.int32)
path = Path(sys.argv[1])
write_candidates(path, model, 3, names[:800], histories[:800], truth[:800])  # what is allocated once
before = peak_memory()
write_candidates(path, model, 3, names, histories, truth)
print(peak_memory() - before)
"""


def test_memory_does_not_grow_with_the_users(tmp_path: Path):
    """All scores of 6,000 users and 30,000 items are 687 MiB, those of 64 users 7: a tenth of all is not exceeded."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "c.parquet")]
    ended = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert float(ended.stdout) < 68
