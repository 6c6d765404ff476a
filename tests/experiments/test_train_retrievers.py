"""The queue of the retrievers: what follows from earlier runs, and which runs are pruned."""

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from experiments import train_retrievers
from experiments.kept import RetrieverRun
from experiments.train_retrievers import RUNS, SEEDS, Pruned, _planned, _pruning
from models.retriever.options import RetrieverTraining

DATASET = "ml-latest-small"


def kept(reached: float, **options: Any) -> RetrieverRun:
    """Return a run that ranks that share of 100 validation users first."""
    ranks = np.where(np.arange(100) < 100 * reached, 1, 0).astype(np.int32)
    facts = {"curve": [[0, None, 0.0], [1000, None, reached]]}
    return RetrieverRun(DATASET, asdict(RetrieverTraining(**options)), facts, ranks, ranks, ranks)


def test_further_runs_follow_from_validation(monkeypatch: pytest.MonkeyPatch):
    """The two best dropouts of LRURec without weight decay, then further seeds of LRURec and of the best model."""
    runs = [
        kept(0.1, dropout=0.2),
        kept(0.2, dropout=0.3),
        kept(0.3, dropout=0.4),
        kept(0.4, model="sasrec", dropout=0.6),
    ]
    monkeypatch.setattr(train_retrievers, "read_retriever_runs", lambda folder: runs)
    planned = list(_planned(DATASET))[len(RUNS[DATASET]) :]
    assert [(p.model, p.dropout, p.weight_decay, p.seed) for p in planned] == [
        ("lrurec", 0.4, 0.0, 42),
        ("lrurec", 0.3, 0.0, 42),
        *(("lrurec", 0.4, 0.01, seed) for seed in SEEDS),
        *(("sasrec", 0.6, 0.01, seed) for seed in SEEDS),
    ]


def test_a_run_far_below_another_of_its_model_is_pruned(monkeypatch: pytest.MonkeyPatch):
    """Less than 85 % of .2 at step 1000 is too little; before that step, or for another model, it is not."""
    monkeypatch.setattr(train_retrievers, "read_retriever_runs", lambda folder: [kept(0.2)])
    curve: list[tuple[int, float | None, float]] = []
    watch = _pruning(DATASET, RetrieverTraining(dropout=0.5), curve)
    watch(800, 0.1)
    watch(1000, 0.17)
    assert curve == [(800, None, 0.1), (1000, None, 0.17)]
    with pytest.raises(Pruned):
        _pruning(DATASET, RetrieverTraining(dropout=0.5), [])(1000, 0.169)
    _pruning(DATASET, RetrieverTraining(model="narm"), [])(1000, 0.01)
