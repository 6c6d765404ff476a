"""Training a retriever: the files that it writes, that it keeps the best validation, and that it is reproducible."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from pipeline import BRIEF_RETRIEVER
from safetensors.torch import load_file

from models.device import torch_device
from models.metrics import recall
from models.retriever import training
from models.retriever.candidates import CandidateTable
from models.retriever.fitting import loop
from models.retriever.options import PRESETS, RetrieverTraining
from models.retriever.trained import TrainedRetriever
from models.retriever.training import train_retriever
from preprocessing.artifacts import read_manifest
from preprocessing.data import load_data
from preprocessing.errors import InputError
from preprocessing.preprocess import Preprocessing, preprocess
from serving.server.programs import free_ports

CHECKPOINT = training.CHECKPOINTS[0]
BRIEF = RetrieverTraining(width=8, blocks=1, max_length=6, epochs=12, validate_every=4, batch_size=16, seed=3)


@pytest.fixture(scope="module")
def cycling(tmp_path_factory):
    """Return data of 60 users who walk around one circle of 30 items: the next item is certain and easy to learn."""
    folder = tmp_path_factory.mktemp("cycling")
    rows = ["user,item,timestamp,title"]
    for user in range(60):
        rows += [f"{user},{(user + step) % 30},{step},Film {(user + step) % 30}" for step in range(12)]
    (folder / "log.csv").write_text("\n".join(rows) + "\n")
    preprocess(Preprocessing(dataset="table", raw=folder / "log.csv"), folder)
    return folder


@pytest.mark.parametrize(
    "chosen",
    [
        {"model": "lrurec"},
        *(
            pytest.param(baseline, marks=pytest.mark.thorough)
            for baseline in (
                {"model": "lrurec", "negatives": 8, "validation_users": 20},
                {"model": "sasrec"},
                {"model": "sasrec", "loss": "binary"},
                {"model": "bert4rec"},
                {"model": "narm"},
            )
        ),
    ],
)
def test_it_learns_what_is_certain(cycling, tmp_path, chosen):
    """Every next item follows from the last one, so Recall@10 comes close to 1; by chance it is a third."""
    (tmp_path / "data").symlink_to(cycling / "data")
    changed = {"width": 32, "epochs": 150, "learning_rate": 3e-3, "validate_every": 40, "dropout": 0.1}
    options = replace(BRIEF, **changed, **chosen)
    assert train_retriever(options, tmp_path)["test"]["Recall@10"] > 0.9


def test_some_users_stop_the_training_and_all_are_measured(cycling, tmp_path, monkeypatch):
    """With 20 validation users, each validation ranks 20 of the 60 users, and the metrics are over all 60."""
    ranked = []
    rank = loop.rank_users
    monkeypatch.setattr(loop, "rank_users", lambda *given: ranked.append(len(given[3])) or rank(*given))
    (tmp_path / "data").symlink_to(cycling / "data")
    train_retriever(replace(BRIEF, epochs=1, validation_users=20), tmp_path)
    assert set(ranked) == {20}
    assert len(CandidateTable.read(tmp_path / "retriever" / "candidates-validation.parquet").users) == 60


def test_the_tables_hold_what_the_metrics_say(artifacts):
    """Recall@10 is counted from the ranks that were written, and no candidate is in the user's history."""
    metrics = json.loads((artifacts / "retriever" / "metrics.json").read_text())
    data = load_data(artifacts)
    for split, known in (("validation", data.training), ("test", map(np.append, data.training, data.validation))):
        table = CandidateTable.read(artifacts / "retriever" / f"candidates-{split}.parquet")
        assert recall(table.ranks, 10) == pytest.approx(metrics[split]["Recall@10"])
        assert table.users == data.users
        for row, history in zip(table.candidates, known, strict=True):
            assert len(row.items) == 20
            assert not set(row.items.tolist()) & set(history.tolist())


def test_the_authors_mask_leaves_older_items_to_be_recommended(cycling, tmp_path):
    """With `last-window`, only the last 6 items are masked, which is all that the model reads.

    Users have 12 different items, so candidates may be among the first ones.
    """
    (tmp_path / "data").symlink_to(cycling / "data")
    train_retriever(replace(BRIEF, mask="last-window"), tmp_path)
    data = load_data(tmp_path)
    table = CandidateTable.read(tmp_path / "retriever" / "candidates-test.parquet")
    histories = [*map(np.append, data.training, data.validation)]
    pairs = [(set(row.items.tolist()), items) for row, items in zip(table.candidates, histories, strict=True)]
    assert not any(found & set(items[-6:].tolist()) for found, items in pairs)
    assert any(found & set(items[:-6].tolist()) for found, items in pairs)


def test_the_best_validation_is_kept(artifacts):
    """The written weights reach the best validation on record, which is that of the model without the signals."""
    metrics = json.loads((artifacts / "retriever" / "metrics.json").read_text())
    reached = metrics["model_alone"]["validation"]["Recall@10"]
    assert reached == pytest.approx(metrics["best_validation_Recall@10"])


def test_the_same_seed_gives_the_same_weights(cycling, tmp_path):
    """On one machine, the weights are bit-identical for the same seed and different for another one."""
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
    """With the same options on the same data, nothing is trained and the metrics are read from the file."""
    monkeypatch.setattr(training, "fit", lambda *_: pytest.fail("trained again"))
    metrics = train_retriever(BRIEF_RETRIEVER, artifacts)
    assert metrics == json.loads((artifacts / "retriever" / "metrics.json").read_text())


def test_a_trained_retriever_loads_in_evaluation_mode(artifacts):
    """With the options that it was trained with, where the device is the one that ``auto`` stood for."""
    trained = TrainedRetriever.load(artifacts / "retriever")
    assert trained.options == replace(BRIEF_RETRIEVER, device=torch_device("auto"))
    assert [model.model.training for model in trained.models] == [False]
    assert (
        read_manifest(artifacts / "retriever", "retriever", "").facts["items"] == load_data(artifacts).catalogue.trained
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model": "gru4rec"}, "there is no retriever 'gru4rec'"),
        ({"loss": "hinge"}, "there is no loss 'hinge'"),
        ({"model": "sasrec", "loss": "cloze"}, "sasrec cannot train with loss cloze"),
        ({"model": "bert4rec", "loss": "softmax"}, "bert4rec cannot train with loss softmax"),
        ({"mask": "none"}, "there is no mask 'none'"),
        ({"heads": 3}, "width 64 is not a multiple of heads 3"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"masked_share": 0.0}, "masked_share must be above 0 and at most 1, not 0.0"),
        ({"titles": "covers"}, "there are no titles 'covers': choose one of none, words, model"),
        ({"pool": 0}, "pool must be at least 1"),
        ({"negatives": 0}, "negatives must be at least 1, not 0"),
        ({"validation_users": 0}, "validation_users must be at least 1, not 0"),
        ({"model": "bert4rec", "negatives": 100}, "negatives are a sample of the softmax: use them with loss softmax"),
        ({"model": "sasrec", "loss": "binary", "negatives": 100}, "negatives are a sample of the softmax"),
        ({"signals": True, "second": "gru4rec"}, "there is no preset 'gru4rec': choose one of default, demo"),
        ({"second": "paper"}, "a second retriever is weighed together with the signals: use signals too"),
    ],
)
def test_options_out_of_range_are_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        RetrieverTraining(**wrong)


def test_every_preset_is_of_the_model_it_names():
    """`sasrec-beauty` trains a SASRec without a further option; the paper's presets train LRURec."""
    models = {name: RetrieverTraining(**preset).model for name, preset in PRESETS.items()}
    lrurec = dict.fromkeys(("default", "demo", "paper", "paper-ml-latest-small"), "lrurec")
    assert models == {**lrurec, "sasrec-beauty": "sasrec"}


def test_the_papers_presets_are_the_papers():
    """They have neither titles nor signals, which the paper does not have; the default has both."""
    presets = {name: RetrieverTraining(**preset) for name, preset in PRESETS.items()}
    for name in ("paper", "paper-ml-latest-small", "sasrec-beauty"):
        assert (presets[name].titles, presets[name].signals, presets[name].second) == ("none", False, None)
    assert (presets["default"].titles, presets["default"].signals) == ("words", True)


def test_without_data_the_command_is_named(tmp_path):
    with pytest.raises(InputError, match="run `llamarec preprocess` first"):
        train_retriever(BRIEF, tmp_path)


class Interrupted(BaseException):
    """An exception that ends a training as a signal would."""


def trained_weights(folder):
    return load_file(folder / "retriever" / "model.safetensors")


@pytest.mark.parametrize("model", ["lrurec", "sasrec"])
def test_an_interrupted_training_goes_on_where_it_was(cycling, tmp_path, model):
    """Interrupted between two validations, a training resumes to weights bit-identical to an uninterrupted one's."""
    options = replace(BRIEF, model=model)
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").symlink_to(cycling / "data")
    through = train_retriever(options, tmp_path / "whole")

    def interrupt(step, _):
        if step == 12:
            raise Interrupted

    with pytest.raises(Interrupted):
        train_retriever(options, tmp_path / "broken", watch=interrupt)
    assert not (tmp_path / "broken" / "retriever").exists()
    seen = []
    again = train_retriever(options, tmp_path / "broken", watch=lambda step, _: seen.append(step))
    assert seen[0] == 16
    assert again["curve"] == through["curve"]
    whole, broken = (trained_weights(tmp_path / name) for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert not (tmp_path / "broken" / CHECKPOINT).exists()


def test_what_the_watcher_raises_ends_the_training_and_leaves_nothing(cycling, tmp_path):
    """The watcher receives step and Recall@10 of every validation, and its error ends the training."""
    (tmp_path / "data").symlink_to(cycling / "data")
    told = []

    def watch(step, reached):
        told.append((step, reached))
        if step == 8:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        train_retriever(BRIEF, tmp_path, watch=watch)
    assert [step for step, _ in told] == [0, 4, 8]
    assert all(0 <= reached <= 1 for _, reached in told)
    assert {path.name for path in tmp_path.iterdir()} == {"data", "logs"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "narm"}, "belongs to a training with model lrurec, not narm: finish that training"),
        ({"dropout": 0.3}, "belongs to a training with dropout 0.2, not 0.3"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(cycling, tmp_path, changed, message):
    """The checkpoint is neither overwritten nor resumed: the error names what differs and what to do."""
    (tmp_path / "data").symlink_to(cycling / "data")
    with pytest.raises(Interrupted):
        train_retriever(BRIEF, tmp_path, watch=lambda *_: (_ for _ in ()).throw(Interrupted))
    kept = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(InputError, match=message):
        train_retriever(replace(BRIEF, **changed), tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == kept


def test_a_checkpoint_of_another_data_set_is_refused(cycling, artifacts, tmp_path):
    (tmp_path / "data").symlink_to(cycling / "data")
    with pytest.raises(Interrupted):
        train_retriever(BRIEF, tmp_path, watch=lambda *_: (_ for _ in ()).throw(Interrupted))
    (tmp_path / "data").unlink()
    (tmp_path / "data").symlink_to(artifacts / "data")
    with pytest.raises(InputError, match="checkpoint of a training on another data set"):
        train_retriever(BRIEF, tmp_path)


def test_a_file_that_is_no_checkpoint_is_named(cycling, tmp_path):
    """Nothing in it is unpickled, because weights_only loading refuses anything but tensors."""
    (tmp_path / "data").symlink_to(cycling / "data")
    torch.save({"made_by": print}, tmp_path / CHECKPOINT)
    with pytest.raises(InputError, match="cannot be read as a checkpoint"):
        train_retriever(BRIEF, tmp_path)


def test_a_loss_that_is_no_number_stops_with_step_and_learning_rate(cycling, tmp_path):
    """A learning rate of 1e30 overflows within the first steps."""
    (tmp_path / "data").symlink_to(cycling / "data")
    with pytest.raises(InputError, match=r"the loss is (nan|inf) at step \d+, learning rate 1e\+30: lower it"):
        train_retriever(replace(BRIEF, learning_rate=1e30), tmp_path)
    assert not (tmp_path / "retriever").exists()


def test_the_course_is_written_for_tensorboard_and_as_a_picture(cycling, tmp_path):
    """Recall@10 of every validation can be read back from the events, and the picture is a PNG."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "data").symlink_to(cycling / "data")
    metrics = train_retriever(BRIEF, tmp_path)
    events = EventAccumulator(str(tmp_path / "logs" / "retriever")).Reload().Scalars("validation/Recall@10")
    assert [(event.step, pytest.approx(event.value)) for event in events] == [
        (step, reached) for step, _, reached in metrics["curve"]
    ]
    assert (tmp_path / "retriever" / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.thorough
def test_two_processes_train_what_one_does(cycling, tmp_path):
    """`accelerate launch` with two processes over gloo, without dropout, gives the weights of one, up to rounding.

    On CPUs, each call starts one process; the environment variables are those that mpirun or torchrun would set.
    """
    weights = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        (folder / "data").symlink_to(cycling / "data")
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "-m", "llamarec.cli"]
        command += ["train-retriever", "--artifacts", str(folder), "--json", "--max-length=6", "--validate-every=8"]
        command += ["--epochs=8", "--batch-size=16", "--seed=3", "--dropout=0", "--preset=paper"]
        shared = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_ports(1)[0]),
        }
        running = [
            subprocess.Popen(
                command,
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for rank in range(processes)
        ]
        first, *others = [process.communicate(timeout=300) for process in running]
        assert [process.returncode for process in running] == [0] * processes, first[1].decode()
        metrics = json.loads(first[0])
        assert metrics["steps"] == 32  # 60 users in 4 batches, 8 epochs
        assert metrics["best_step"] > 0
        assert all(out == b"" for out, _ in others)  # the metrics are printed once
        weights[processes] = trained_weights(folder)
    for name, tensor in weights[1].items():
        torch.testing.assert_close(weights[2][name], tensor, atol=1e-4, rtol=1e-3, msg=name)
    # The two did not each train alone: sums in another order differ in the last digits.
    assert any(not torch.equal(weights[1][name], weights[2][name]) for name in weights[1])
