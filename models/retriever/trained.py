"""A trained retrieval stage in PyTorch: it retrieves, ranks and writes candidates for the later stages."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file

from models.retriever.architectures.build import build_model
from models.retriever.architectures.retriever import Retriever
from models.retriever.batches import Items
from models.retriever.candidates import Candidates, CandidateWriter, mask, place_of
from models.retriever.options import RetrieverTraining
from models.retriever.ranking import USERS_AT_ONCE, score_histories
from models.retriever.rules import Selection, select
from models.retriever.stage import RetrievalStage, Row, rank_in
from models.signals.signals import Signals
from preprocessing.artifacts import read_manifest

KIND = "retriever"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
PROJECTION_FILE = "projection.safetensors"
SECOND = "second"
"""Subfolder of the second retriever."""


@dataclass(frozen=True)
class TrainedModel:
    """One trained retriever; the vectors of its items contain their titles, if it was trained with any."""

    model: Retriever
    options: RetrieverTraining
    items: int
    """Number of items that it retrieves: the trained ones, or the whole catalogue."""

    @classmethod
    def load(cls, folder: Path) -> "TrainedModel":
        """Return the model in a folder, in evaluation mode on the CPU."""
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        items = config.pop("items")
        options = RetrieverTraining(**config)
        model = build_model(options, items)
        model.load_state_dict(load_file(folder / WEIGHTS))
        return cls(model.eval(), options, items)

    def scores(self, histories: Sequence[Items]) -> Iterator[Row]:
        """Yield the logits [items + 1] of the next item for each history."""
        return score_histories(self.model, self.options.max_length, histories)


@dataclass(frozen=True)
class TrainedRetriever:
    """A trained retrieval stage: one or two retrievers, and the signals that reorder their items, if any."""

    models: Sequence[TrainedModel]
    stage: RetrievalStage

    @classmethod
    def load(cls, folder: Path) -> "TrainedRetriever":
        """Return the stage in ``artifacts/retriever``.

        Raises:
            InputError: ``folder`` is not a finished retriever.
        """
        read_manifest(folder, KIND, "llamarec train-retriever")
        folders = [folder, folder / SECOND] if (folder / SECOND).is_dir() else [folder]
        return cls([TrainedModel.load(one) for one in folders], RetrievalStage(Signals.load(folder)))

    @property
    def options(self) -> RetrieverTraining:
        """Options of the training."""
        return self.models[0].options

    def rows(self, histories: Sequence[Items]) -> Iterator[tuple[Row, ...]]:
        """Yield each retriever's logits [items + 1] of the next item for each history."""
        return zip(*(model.scores(histories) for model in self.models), strict=True)

    def retrieve(self, histories: Sequence[Items], k: int, by: Selection | None = None) -> list[Candidates]:
        """Return the best ``k`` items for each history, with the items of the history masked, or by the rules given."""
        scored = zip(self.rows(histories), histories, strict=True)
        if by is None:
            return [self.stage.candidates(rows, history, history, k) for rows, history in scored]
        return [
            select(self.stage, rows, history, by.rules.masked_of(history), k, by.rules, by.groups)
            for rows, history in scored
        ]

    def write_candidates(
        self, path: Path, users: Sequence[str], histories: Sequence[Items], truth: NDArray[np.int32], k: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Write every user's best ``k`` items and the rank of the true item to Parquet, batch by batch.

        Args:
            path: the Parquet file.
            users: raw user ids.
            histories: item numbers of each history, oldest first; they are masked.
            truth: number of each user's true item [users].
            k: number of candidates.

        Returns:
            the rank of each user's true item among all items, by the stage [users] and by the first retriever alone
            [users]; 0 for an item in the history.
        """
        ranks, alone = np.empty(len(users), np.int32), np.empty(len(users), np.int32)
        scored = self.rows(histories)
        with CandidateWriter(path) as writer:
            for start in range(0, len(users), USERS_AT_ONCE):
                candidates = []
                for user, rows in enumerate(islice(scored, USERS_AT_ONCE), start):
                    history, item = histories[user], int(truth[user])
                    ordered = self.stage.ordered(rows, history, history, k)
                    mask(rows[0], history)
                    candidates.append(ordered.first(k))
                    ranks[user], alone[user] = rank_in(ordered, rows[0], item), place_of(rows[0], item)
                some = slice(start, start + USERS_AT_ONCE)
                writer.write(users[some], candidates, truth[some], ranks[some], alone[some])
        return ranks, alone
