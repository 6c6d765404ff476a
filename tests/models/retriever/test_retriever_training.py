"""Training a retriever: what is written, that it is the best validation's, and that seeds decide it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from pipeline import BRIEF_RETRIEVER
from safetensors.torch import load_file

from models.metrics import recall
from models.retriever import training
from models.retriever.candidates import CandidateTable
from models.retriever.options import PRESETS, RetrieverTraining
from models.retriever.training import load_retriever, train_retriever
from preprocessing.artifacts import read_manifest
from preprocessing.data import load_data
from preprocessing.errors import InputError
from preprocessing.preprocess import Preprocessing, preprocess

BRIEF = RetrieverTraining(width=8, blocks=1, max_length=6, epochs=12, validate_every=4, batch_size=16, seed=3)


@pytest.fixture(scope="module")
def cycling(tmp_path_factory):
    """60 users who walk round the same circle of 30 items: what comes next is certain and easily learnt."""
    folder = tmp_path_factory.mktemp("cycling")
    rows = ["user,item,timestamp,title"]
    for user in range(60):
        rows += [f"{user},{(user + step) % 30},{step},Film {(user + step) % 30}" for step in range(12)]
    (folder / "log.csv").write_text("\n".join(rows) + "\n")
    preprocess(Preprocessing(dataset="table", raw=folder / "log.csv"), folder)
    return folder


@pytest.mark.parametrize(
    ("model", "loss"),
    [("lrurec", None), ("sasrec", None), ("sasrec", "binary"), ("bert4rec", None), ("narm", None)],
)
def test_it_learns_what_is_certain(cycling, tmp_path, model, loss):
    """Every user's next item follows from the last one: Recall@10 comes near 1, from a third by chance."""
    (tmp_path / "data").symlink_to(cycling / "data")
    options = replace(
        BRIEF, model=model, loss=loss, width=32, epochs=150, learning_rate=3e-3, validate_every=40, dropout=0.1
    )
    assert train_retriever(options, tmp_path)["test"]["Recall@10"] > 0.9


def test_the_tables_hold_what_the_metrics_say(artifacts):
    """Recall@10 counted from the ranks that were written; and no candidate stands in the history."""
    metrics = json.loads((artifacts / "retriever" / "metrics.json").read_text())
    data = load_data(artifacts)
    for split, known in (("validation", data.training), ("test", map(np.append, data.training, data.validation))):
        table = CandidateTable.read(artifacts / "retriever" / f"candidates-{split}.parquet")
        assert recall(table.ranks, 10) == pytest.approx(metrics[split]["Recall@10"])
        assert table.users == data.users
        for row, history in zip(table.candidates, known, strict=True):
            assert len(row.items) == 20
            assert not set(row.items.tolist()) & set(history.tolist())


def test_the_best_validation_is_kept(artifacts):
    """The recorded best is what the written weights reach."""
    metrics = json.loads((artifacts / "retriever" / "metrics.json").read_text())
    assert metrics["validation"]["Recall@10"] == pytest.approx(metrics["best_validation_Recall@10"])


def test_the_same_seed_gives_the_same_weights(cycling, tmp_path):
    """Bit for bit on one machine; another seed gives others."""
    weights = []
    for name, options in (("a", BRIEF), ("b", BRIEF), ("c", replace(BRIEF, seed=4))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").symlink_to(cycling / "data")
        train_retriever(options, tmp_path / name)
        weights.append(load_file(tmp_path / name / "retriever" / "model.safetensors"))
    same, other = (all(torch.equal(weights[0][key], more[key]) for key in more) for more in weights[1:])
    assert same
    assert not other


def test_a_finished_training_is_left_alone(artifacts, monkeypatch):
    """The same options on the same data: nothing is trained, the metrics are read."""
    monkeypatch.setattr(training, "fit", lambda *_: pytest.fail("trained again"))
    metrics = train_retriever(BRIEF_RETRIEVER, artifacts)
    assert metrics == json.loads((artifacts / "retriever" / "metrics.json").read_text())


def test_a_trained_retriever_loads_in_evaluation_mode(artifacts):
    model, options = load_retriever(artifacts / "retriever")
    assert options == BRIEF_RETRIEVER
    assert not model.training
    assert (
        read_manifest(artifacts / "retriever", "retriever", "").facts["items"] == load_data(artifacts).catalogue.trained
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model": "gru4rec"}, "there is no retriever 'gru4rec'"),
        ({"loss": "hinge"}, "there is no loss 'hinge'"),
        ({"model": "sasrec", "loss": "cloze"}, "sasrec does not learn by cloze"),
        ({"model": "bert4rec", "loss": "softmax"}, "bert4rec does not learn by softmax"),
        ({"heads": 3}, "3 heads cannot share a width of 64"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
    ],
)
def test_options_out_of_range_are_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        RetrieverTraining(**wrong)


def test_every_preset_is_of_the_model_it_names():
    """`sasrec-beauty` trains a SASRec without being told so; the paper's are LRURec's."""
    models = {name: RetrieverTraining(**preset).model for name, preset in PRESETS.items()}
    assert models == {"demo": "lrurec", "paper": "lrurec", "paper-ml-latest-small": "lrurec", "sasrec-beauty": "sasrec"}


def test_without_data_the_command_is_named(tmp_path):
    with pytest.raises(InputError, match="run `llamarec preprocess` first"):
        train_retriever(BRIEF, tmp_path)
