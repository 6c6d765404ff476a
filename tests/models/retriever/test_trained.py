"""The trained stage: what it retrieves and writes is that of one user at a time, in bounded memory."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from retrieval import alone, random_model, random_signals

from models.retriever import ranking, trained
from models.retriever.batches import pad_left
from models.retriever.candidates import CandidateTable, mask, place_of, top_candidates
from models.retriever.options import RetrieverTraining
from models.retriever.ranking import rank_users
from models.retriever.stage import RetrievalStage, rank_in
from models.retriever.trained import TrainedRetriever
from preprocessing.errors import InputError

ITEMS, LENGTH = 40, 6
FIRST = random_model(RetrieverTraining(width=8, blocks=1, max_length=LENGTH), ITEMS)
SECOND = random_model(RetrieverTraining(model="sasrec", width=8, blocks=1, max_length=9), ITEMS, seed=8)
ROOT = Path(__file__).parents[3]


def scores_of(model, history):
    """Return the logits [items + 1] of a model for one history, computed alone."""
    with torch.no_grad():
        items = torch.from_numpy(pad_left([history], model.options.max_length))
        return model.model.score(model.model(items)[0, -1]).numpy()


def some_histories():
    rng = np.random.default_rng(0)
    return [rng.integers(1, ITEMS + 1, count).astype(np.int32) for count in (3, 0, 9, 1, 5)]


@pytest.fixture(params=[256, 2])
def at_once(request, monkeypatch):
    """Batches of all users, and of two, where the last batch is smaller."""
    for module in (ranking, trained):
        monkeypatch.setattr(module, "USERS_AT_ONCE", request.param)


@pytest.mark.usefixtures("at_once")
def test_files_and_ranks_equal_one_user_at_a_time(tmp_path: Path):
    """The reference scores each history alone; the scores of the file are log-probabilities among the 20 candidates."""
    histories, truth = some_histories(), np.array([7, 9, 1, 30, 12], np.int32)
    ranks, model_ranks = alone(FIRST).write_candidates(tmp_path / "c.parquet", list("abcde"), histories, truth, 20)
    table = CandidateTable.read(tmp_path / "c.parquet")
    expected_ranks = rank_users(FIRST.model, LENGTH, histories, truth).tolist()
    assert ranks.tolist() == model_ranks.tolist() == expected_ranks
    assert table.ranks.tolist() == table.model_ranks.tolist() == expected_ranks
    assert (table.users, table.truth.tolist()) == (list("abcde"), truth.tolist())
    for user, row in enumerate(table.candidates):
        scores = scores_of(FIRST, histories[user])
        mask(scores, histories[user])
        expected = top_candidates(scores, histories[user], 20)
        assert row.items.tolist() == expected.items.tolist()
        np.testing.assert_allclose(np.exp(row.scores), expected.probabilities(), atol=1e-5)
        assert ranks[user] == place_of(scores, int(truth[user]))


@pytest.mark.usefixtures("at_once")
def test_a_stage_with_signals_writes_its_own_order_and_both_ranks(tmp_path: Path):
    """The reference is the stage on rows that are computed one history at a time, and the first model's own ranks."""
    signals = random_signals(ITEMS, retrievers=2, pool=25)
    stage = RetrievalStage(signals)
    histories, truth = some_histories(), np.array([7, 9, 1, 30, 12], np.int32)
    both = TrainedRetriever([FIRST, SECOND], stage)
    ranks, model_ranks = both.write_candidates(tmp_path / "c.parquet", list("abcde"), histories, truth, 20)
    table = CandidateTable.read(tmp_path / "c.parquet")
    assert (table.ranks.tolist(), table.model_ranks.tolist()) == (ranks.tolist(), model_ranks.tolist())
    assert model_ranks.tolist() == rank_users(FIRST.model, LENGTH, histories, truth).tolist()
    assert ranks.tolist() != model_ranks.tolist()
    retrieved = both.retrieve(histories, 20)
    for user, (row, found) in enumerate(zip(table.candidates, retrieved, strict=True)):
        rows = [scores_of(model, histories[user]) for model in (FIRST, SECOND)]
        ordered = stage.ordered(rows, histories[user], histories[user], 20)
        assert row.items.tolist() == found.items.tolist() == ordered.items[:20].tolist()
        np.testing.assert_allclose(row.scores, ordered.first(20).scores, atol=1e-5)
        np.testing.assert_array_equal(row.scores, found.scores)
        assert ranks[user] == rank_in(ordered, rows[0], int(truth[user]))


def test_everything_in_a_long_history_is_masked(tmp_path: Path):
    """In a history longer than the model reads, the items that it does not read are masked too and have no place."""
    history = np.arange(1, ITEMS - 3, dtype=np.int32)
    truth = np.array([1], np.int32)
    for stage in (RetrievalStage(), RetrievalStage(random_signals(ITEMS, retrievers=1, pool=25))):
        one = TrainedRetriever([FIRST], stage)
        ranks, model_ranks = one.write_candidates(tmp_path / "c.parquet", ["a"], [history], truth, 20)
        assert (ranks.tolist(), model_ranks.tolist()) == ([0], [0])
        (row,) = CandidateTable.read(tmp_path / "c.parquet").candidates
        assert sorted(row.items) == [37, 38, 39, 40]


def test_a_folder_that_is_no_retriever_is_refused(tmp_path: Path):
    """The error names the command that trains one."""
    with pytest.raises(InputError, match="run `llamarec train-retriever` first"):
        TrainedRetriever.load(tmp_path / "retriever")


PROGRAM = """
import sys
from pathlib import Path
import numpy as np, torch
from benchmarks.memory import peak_memory
from models.retriever.architectures.narm import NARM
from models.retriever.options import RetrieverTraining
from models.retriever.stage import RetrievalStage
from models.retriever.trained import TrainedModel, TrainedRetriever

torch.set_num_threads(1)
users, items = 6_000, 30_000
options = RetrieverTraining(model="narm", width=4, max_length=3)
retriever = TrainedRetriever([TrainedModel(NARM(items, width=4), options, items)], RetrievalStage())
histories = [np.array([1], np.int32)] * users
names, truth = [str(user) for user in range(users)], np.full(users, 2, np.int32)
path = Path(sys.argv[1])
retriever.write_candidates(path, names[:800], histories[:800], truth[:800], 20)  # what is allocated once
before = peak_memory()
retriever.write_candidates(path, names, histories, truth, 20)
print(peak_memory() - before)
"""


@pytest.mark.thorough
def test_memory_does_not_grow_with_the_users(tmp_path: Path):
    """All scores of 6,000 users and 30,000 items take 687 MiB, a batch's 29; memory grows by less than a tenth."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # freed memory is returned at once
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "c.parquet")]
    ended = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert float(ended.stdout) < 68
