"""Trains RecTools' SASRec in an environment of its own; see :mod:`benchmarks.peers`."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import Trainer
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peers.training import OPTIONS, Peer, Recorder, interactions, run, train_by_epochs
from models.retriever.architectures.retriever import Retriever
from preprocessing.data import Data


def trainer() -> Trainer:
    """Return RecTools' default trainer, on the CPU."""
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def dataset(data: Data) -> Dataset:
    """Return the training sequences as RecTools reads them."""
    columns = interactions(data.training)
    frame = pd.DataFrame(
        {
            Columns.User: columns["user"],
            Columns.Item: columns["item"],
            Columns.Weight: 1.0,
            Columns.Datetime: pd.Timestamp(0) + pd.to_timedelta(columns["position"], unit="D"),
        }
    )
    return Dataset.construct(frame)


def peer(model: SASRecModel, items: int) -> Peer:
    """Return the model for this project's ranking.

    Args:
        model: the trained model.
        items: number of items of the catalogue.
    """
    network, known = model.torch_model, model.data_preparator.item_id_map
    numbers = torch.zeros(items + 1, dtype=torch.long)
    # RecTools drops all but a user's last 51 items first, and with them a few items of the catalogue.
    for item in known.external_ids[1:]:
        numbers[int(item)] = int(known.convert_to_internal([item])[0])

    def encode(histories: Tensor) -> Tensor:
        # Its attention reads the padding, so a history has as much of it here as in training.
        padded = F.pad(histories, (OPTIONS.max_length - histories.shape[1], 0))  # [batch, max_length]
        states: Tensor = network.encode_sessions({"x": padded}, network.item_model.get_all_embeddings())
        return states[:, -1]  # [batch, width]

    return Peer(network, encode, network.item_model.get_all_embeddings, numbers)


def train(data: Data, folder: Path, recorder: Recorder) -> Retriever:
    """Train until the recorder stops it, and return the model of the best validation."""
    torch.manual_seed(OPTIONS.seed)
    np.random.seed(OPTIONS.seed)
    model = SASRecModel(
        n_factors=OPTIONS.width,
        n_blocks=OPTIONS.blocks,
        n_heads=OPTIONS.heads,
        dropout_rate=OPTIONS.dropout,
        session_max_len=OPTIONS.max_length,
        batch_size=OPTIONS.batch_size,
        lr=OPTIONS.learning_rate,
        loss="softmax",
        get_trainer_func=trainer,
    )
    sequences = dataset(data)

    def train_epoch() -> Peer:
        model.fit_partial(sequences, min_epochs=1, max_epochs=1)
        return peer(model, data.catalogue.trained)

    return train_by_epochs(train_epoch, data, recorder)


if __name__ == "__main__":
    run("RecTools", ("RecTools", "pytorch-lightning", "torch"), train)
