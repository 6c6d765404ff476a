"""Ranking many users at once: the candidates and places are those of one user at a time, in bounded memory."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from models.retriever import ranking
from models.retriever.architectures.lrurec import LRURec
from models.retriever.batches import pad_left
from models.retriever.candidates import CandidateTable, mask, place_of, top_candidates
from models.retriever.ranking import rank_users, score_histories, write_candidates

ITEMS = 12
ROOT = Path(__file__).parents[3]


@pytest.fixture
def model():
    torch.manual_seed(3)
    return LRURec(ITEMS, width=8, blocks=1)


@pytest.mark.parametrize("at_once", [256, 2])
def test_files_and_ranks_equal_one_user_at_a_time(model, monkeypatch, tmp_path: Path, at_once):
    """The reference scores each history alone; batches of two are tested too, where the last batch is smaller."""
    monkeypatch.setattr(ranking, "USERS_AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    histories = [rng.integers(1, ITEMS + 1, count).astype(np.int32) for count in (3, 0, 9, 1, 5)]
    truth = rng.integers(1, ITEMS + 1, 5).astype(np.int32)
    ranks = write_candidates(tmp_path / "c.parquet", model, 6, list("abcde"), histories, truth)
    table = CandidateTable.read(tmp_path / "c.parquet")
    assert ranks.tolist() == table.ranks.tolist() == rank_users(model, 6, histories, truth).tolist()
    assert (table.users, table.truth.tolist()) == (list("abcde"), truth.tolist())
    for user, row in enumerate(table.candidates):
        with torch.no_grad():
            scores = model.score(model(torch.from_numpy(pad_left([histories[user]], 6)))[0, -1]).numpy()
        mask(scores, histories[user])
        expected = top_candidates(scores, histories[user], 20)
        assert row.items.tolist() == expected.items.tolist()
        np.testing.assert_allclose(row.scores, expected.scores, atol=1e-5)
        assert ranks[user] == place_of(scores, int(truth[user]))


def test_everything_in_a_long_history_is_masked(model, tmp_path: Path):
    """In a history longer than the model reads, the items that it does not read are masked too and have no place."""
    history = np.array([1, 2, 3, 4, 5, 6, 7, 8], np.int32)
    truth = np.array([1], np.int32)
    assert write_candidates(tmp_path / "c.parquet", model, 3, ["a"], [history], truth).tolist() == [0]
    (row,) = CandidateTable.read(tmp_path / "c.parquet").candidates
    assert sorted(row.items) == [9, 10, 11, 12]


def test_a_large_catalogue_makes_small_batches(model, monkeypatch):
    """With at most 40 scores at once and 13 per user, seven users come in batches of three, three and one."""
    sizes = []
    monkeypatch.setattr(ranking, "SCORES_AT_ONCE", 40)
    monkeypatch.setattr(ranking, "pad_left", lambda some, length: sizes.append(len(some)) or pad_left(some, length))
    assert len(list(score_histories(model, 3, [np.array([1], np.int32)] * 7))) == 7
    assert sizes == [3, 3, 1]


PROGRAM = """
import sys
from pathlib import Path
import numpy as np, torch
from benchmarks.memory import peak_memory
from models.retriever import ranking
from models.retriever.architectures.narm import NARM
from models.retriever.ranking import write_candidates

torch.set_num_threads(1)
users, items = 6_000, 30_000
model, histories = NARM(items, width=4), [np.array([1], np.int32)] * users
names, truth = [str(user) for user in range(users)], np.full(users, 2, np.int32)
path = Path(sys.argv[1])
write_candidates(path, model, 3, names[:800], histories[:800], truth[:800])  # what is allocated once
before = peak_memory()
write_candidates(path, model, 3, names, histories, truth)
print(peak_memory() - before)
"""


@pytest.mark.thorough
def test_memory_does_not_grow_with_the_users(tmp_path: Path):
    """All scores of 6,000 users and 30,000 items take 687 MiB, a batch's 29; memory grows by less than a tenth."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # freed memory is returned at once
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "c.parquet")]
    ended = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert float(ended.stdout) < 68
