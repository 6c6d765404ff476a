"""What the three trainings share: options, clock, validation, and the files that a training leaves behind.

This module runs in both environments, so the sequences, the ranking and the metrics are the same code for all systems.
"""

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.clock import add_clock, chosen_clock
from benchmarks.memory import peak_memory
from models.metrics import recall
from models.retriever.architectures.retriever import Retriever
from models.retriever.batches import Items
from models.retriever.options import RetrieverTraining
from models.retriever.ranking import rank_users
from preprocessing.data import Data, load_data

OPTIONS = RetrieverTraining(model="sasrec", loss="softmax", dropout=0.6, batch_size=512, learning_rate=1e-3)
"""The options of all three trainings, those of the project's published SASRec on Beauty."""
PATIENCE = 1600
"""Number of steps without a better validation Recall@10 after which a training stops."""
FACTS, RANKS = "training.json", "test-ranks.parquet"


@dataclass(frozen=True)
class Validation:
    """Validation Recall@10 at one point of a training."""

    epochs: int
    """Number of passes over the training data so far."""
    steps: int
    seconds: float
    """Seconds of all training steps so far, without validations."""
    recall: float


class Recorder:
    """Measures a training and decides when it stops.

    PyTorch calls it after each step of any optimiser, so the training loops of all systems are measured alike.

    Args:
        system: name of the system, for the printed progress.
        clock: function that returns seconds.
        limit_s: seconds of training steps after which the training stops.
    """

    def __init__(self, system: str, clock: Callable[[], float], limit_s: float) -> None:
        self.curve: list[Validation] = []
        self._system, self._limit_s = system, limit_s
        self._ended: list[float] = []
        register_optimizer_step_post_hook(lambda *_: self._ended.append(clock()))

    def validated(self, epochs: int, reached: float) -> bool:
        """Record a validation after whole epochs, and return whether it is the best one so far.

        Args:
            epochs: number of epochs so far.
            reached: Recall@10.
        """
        ended, self._ended = self._ended, []
        before = self.curve[-1] if self.curve else Validation(0, 0, 0.0, 0.0)
        # The start of the first step is unknown; it is taken to last as long as the others do on average.
        seconds = (ended[-1] - ended[0]) * len(ended) / (len(ended) - 1)
        now = Validation(epochs, before.steps + len(ended), round(before.seconds + seconds, 2), round(reached, 5))
        better = all(now.recall > earlier.recall for earlier in self.curve)
        self.curve.append(now)
        pace = seconds / (epochs - before.epochs)
        print(f"{self._system}: epoch {epochs}, {pace:.1f} s an epoch, validation Recall@10 {reached:.4f}", flush=True)
        return better

    @property
    def stopped(self) -> str | None:
        """Why the training has to stop: ``limit`` or ``patience``; None if it goes on."""
        if not self.curve:
            return None
        if self.curve[-1].seconds >= self._limit_s:
            return "limit"
        best = max(self.curve, key=lambda validation: validation.recall)
        return "patience" if self.curve[-1].steps - best.steps >= PATIENCE else None


class Peer(nn.Module):
    """Another library's model, for this project's ranking: it reads and scores this project's item numbers.

    Args:
        model: the library's model.
        encode: function that maps left-padded item numbers of the library [batch, length] to states [batch, width].
        vectors: function that returns the vectors of the library's items [its items, width].
        numbers: the library's number of each item [items + 1]; 0 for the padding and for items it does not know.
    """

    def __init__(
        self, model: nn.Module, encode: Callable[[Tensor], Tensor], vectors: Callable[[], Tensor], numbers: Tensor
    ) -> None:
        super().__init__()
        self.model = model
        self._encode, self._vectors, self._numbers = encode, vectors, numbers

    def last_state(self, items: Tensor) -> Tensor:
        """Return the states [batch, width] of left-padded histories [batch, length]."""
        return self._encode(self._numbers[items])

    def head(self) -> tuple[Tensor, Tensor]:
        """Return the items' vectors [items + 1, width] and biases [items + 1]; an unknown item is never retrieved."""
        unknown = torch.where(self._numbers == 0, -torch.inf, 0.0)  # [items + 1]
        return self._vectors()[self._numbers], unknown

    def rank(self, histories: Sequence[Items], truth: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the rank of each user's true item [users]; see :func:`rank_users`."""
        return rank_users(cast(Retriever, self), OPTIONS.max_length, histories, truth)


def train_by_epochs(train_epoch: Callable[[], Peer], data: Data, recorder: Recorder) -> Retriever:
    """Train and validate epoch by epoch until the recorder stops it, and return the model of the best validation.

    Args:
        train_epoch: function that trains for an epoch and returns the model.
        data: the sequences.
        recorder: see :class:`Recorder`.
    """
    epochs = 0
    while recorder.stopped is None:
        peer = train_epoch()
        epochs += 1
        if recorder.validated(epochs, recall(peer.rank(data.training, data.validation), 10)):
            best = copy.deepcopy(peer.state_dict())
    peer.load_state_dict(best)
    return cast(Retriever, peer)


def interactions(sequences: Sequence[Items]) -> dict[str, NDArray[np.int64]]:
    """Return sequences as interactions: the columns ``user`` (from 0), ``item`` and ``position`` (from 0)."""
    lengths = [len(items) for items in sequences]
    return {
        "user": np.repeat(np.arange(len(sequences)), lengths),
        "item": np.concatenate(sequences).astype(np.int64),
        "position": np.concatenate([np.arange(length) for length in lengths]),
    }


def right_padded(items: Tensor) -> tuple[Tensor, Tensor]:
    """Return left-padded rows [batch, length] padded on the right instead, and the number of items of each [batch]."""
    lengths = (items > 0).sum(dim=1)
    rows = [
        F.pad(row[len(row) - count :], (0, len(row) - count))
        for row, count in zip(items, lengths.tolist(), strict=True)
    ]
    return torch.stack(rows), lengths


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that the benchmark hands on to each training."""
    parser.add_argument("--artifacts", type=Path, required=True, help="Folder that holds the preprocessed data set.")
    parser.add_argument(
        "--limit-minutes", type=float, default=120, help="Minutes of training after which a system is stopped."
    )
    add_clock(parser)


def run(system: str, packages: Sequence[str], train: Callable[[Data, Path, Recorder], Retriever]) -> None:
    """Parse the command line, train one system and write its facts and test ranks.

    Args:
        system: its name.
        packages: packages whose versions are recorded.
        train: function that trains it in a folder and returns the model of the best validation.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    add_training_options(parser)
    parser.add_argument("--folder", type=Path, required=True, help="Folder of this training.")
    given = parser.parse_args()
    recorder = Recorder(system, chosen_clock(given), 60 * given.limit_minutes)
    data = load_data(given.artifacts)
    model = train(data, given.folder, recorder)
    facts = {
        "versions": {package: metadata.version(package) for package in packages},
        "peak_mib": round(peak_memory()),
        "stopped": recorder.stopped,
        "curve": [asdict(validation) for validation in recorder.curve],
    }
    ranks = rank_users(model, OPTIONS.max_length, data.test_histories(), data.test)
    pq.write_table(pa.table({"user": data.users, "rank": ranks}), given.folder / RANKS)
    (given.folder / FACTS).write_text(json.dumps(facts))
