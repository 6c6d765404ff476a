"""Scoring and ranking many users at once: the scores and places are those of one user at a time, in bounded memory."""

import numpy as np
import pytest
import torch

from models.retriever import ranking
from models.retriever.architectures.lrurec import LRURec
from models.retriever.batches import pad_left
from models.retriever.candidates import mask, place_of
from models.retriever.ranking import rank_users, score_histories

ITEMS = 12


@pytest.fixture
def model():
    torch.manual_seed(3)
    return LRURec(ITEMS, width=8, blocks=1)


@pytest.mark.parametrize("at_once", [256, 2])
def test_scores_and_ranks_equal_one_user_at_a_time(model, monkeypatch, at_once):
    """The reference scores each history alone; batches of two are tested too, where the last batch is smaller."""
    monkeypatch.setattr(ranking, "USERS_AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    histories = [rng.integers(1, ITEMS + 1, count).astype(np.int32) for count in (3, 0, 9, 1, 5)]
    truth = rng.integers(1, ITEMS + 1, 5).astype(np.int32)
    ranks = rank_users(model, 6, histories, truth)
    for user, found in enumerate(score_histories(model, 6, histories)):
        with torch.no_grad():
            scores = model.score(model(torch.from_numpy(pad_left([histories[user]], 6)))[0, -1]).numpy()
        np.testing.assert_allclose(found, scores, atol=1e-5)
        mask(scores, histories[user])
        assert ranks[user] == place_of(scores, int(truth[user]))


def test_a_large_catalogue_makes_small_batches(model, monkeypatch):
    """With at most 40 scores at once and 13 per user, seven users come in batches of three, three and one."""
    sizes = []
    monkeypatch.setattr(ranking, "SCORES_AT_ONCE", 40)
    monkeypatch.setattr(ranking, "pad_left", lambda some, length: sizes.append(len(some)) or pad_left(some, length))
    assert len(list(score_histories(model, 3, [np.array([1], np.int32)] * 7))) == 7
    assert sizes == [3, 3, 1]
