"""Trains RecBole's SASRec in an environment of its own; see :mod:`benchmarks.peers`."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.sequential_recommender import SASRec
from recbole.trainer import Trainer
from recbole.utils import init_seed
from torch import Tensor

from benchmarks.peers.training import OPTIONS, Peer, Recorder, interactions, right_padded, run, train_by_epochs
from models.retriever.architectures.retriever import Retriever
from preprocessing.data import Data

NAME = "sequences"


def write_interactions(data: Data, folder: Path) -> None:
    """Write whole sequences as RecBole's atomic file; its leave-one-out split takes the last two items out again."""
    columns = interactions([np.append(*parts) for parts in zip(data.test_histories(), data.test, strict=True)])
    header = {"user": "user_id:token", "item": "item_id:token", "position": "timestamp:float"}
    (folder / NAME).mkdir()
    frame = pd.DataFrame(columns).rename(columns=header)
    frame.to_csv(folder / NAME / f"{NAME}.inter", sep="\t", index=False)


def config(folder: Path) -> Config:
    """Return the configuration: the shared options, and RecBole's defaults for everything else."""
    return Config(
        model="SASRec",
        dataset=NAME,
        config_dict={
            "data_path": str(folder),
            "checkpoint_dir": str(folder),
            "use_gpu": False,
            "show_progress": False,
            "state": "WARNING",
            "seed": OPTIONS.seed,
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
            "train_neg_sample_args": None,
            "loss_type": "CE",
            "MAX_ITEM_LIST_LENGTH": OPTIONS.max_length,
            "train_batch_size": OPTIONS.batch_size,
            "learning_rate": OPTIONS.learning_rate,
            "n_layers": OPTIONS.blocks,
            "n_heads": OPTIONS.heads,
            "hidden_size": OPTIONS.width,
            "inner_size": OPTIONS.width,
            "hidden_dropout_prob": OPTIONS.dropout,
            "attn_dropout_prob": OPTIONS.dropout,
        },
    )


def train(data: Data, folder: Path, recorder: Recorder) -> Retriever:
    """Train until the recorder stops it, and return the model of the best validation."""
    sys.argv = sys.argv[:1]  # RecBole's configuration reads the command line
    torch.autograd.set_detect_anomaly(False)  # importing RecBole's models switches it on, which slows every step
    write_interactions(data, folder)
    settings = config(folder)
    init_seed(settings["seed"], settings["reproducibility"])
    known = create_dataset(settings)
    examples, _, _ = data_preparation(settings, known)
    model = SASRec(settings, examples.dataset)
    trainer = Trainer(settings, model)
    tokens = [str(item) for item in range(1, data.catalogue.trained + 1)]
    numbers = torch.tensor([0, *known.token2id(known.iid_field, tokens)])

    def encode(histories: Tensor) -> Tensor:
        states: Tensor = model(*right_padded(histories))
        return states

    ranked = Peer(model, encode, lambda: model.item_embedding.weight, numbers)
    trainer.epochs = 0

    def train_epoch() -> Peer:
        trainer.start_epoch, trainer.epochs = trainer.epochs, trainer.epochs + 1
        trainer.fit(examples, verbose=False, saved=False)
        return ranked

    return train_by_epochs(train_epoch, data, recorder)


if __name__ == "__main__":
    run("RecBole", ("recbole", "torch"), train)
