"""Cross-fits the retriever: training candidates come from retrievers that were not trained on their users.

A retriever ranks the sequences it was trained on far too well, and a ranker trained on such lists learns to trust the
first candidate. Therefore users are split into folds, and each fold's lists come from a retriever trained on the other
folds. The true item then has the rank that it would have for an unseen user, as in validation and test. The signals of
that retriever are counted without its fold's users too, so that no transition counts the pair that it predicts.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from accelerate import PartialState
from numpy.typing import NDArray

from models.ranker.examples.sampling import Position
from models.retriever.candidates import Candidates
from models.retriever.options import RetrieverTraining
from models.retriever.trained import TrainedRetriever
from models.retriever.training import train_retriever
from models.titles.vectors import KIND as TITLES
from preprocessing.artifacts import is_finished, new_artifact, read_manifest
from preprocessing.catalogue import ITEMS_FILE
from preprocessing.data import KIND, SEQUENCES_FOLDER, STATISTICS_FILE, Data, Statistics, read_sequences

FOLDER = "crossfit"
DEALING_SEED = 0
"""Seed of the split into folds, fixed so that trainings with different seeds share the folds and their retrievers."""


@dataclass(frozen=True)
class CrossFit:
    """One retriever for each fold of users, trained without those users."""

    fold: NDArray[np.int64]
    """Fold of each user [users]."""
    retrievers: list[TrainedRetriever]
    candidates: int
    """Number of candidates in a list."""

    def lists(self, positions: Sequence[Position]) -> list[Candidates]:
        """Return the candidates of each position, best first, from the retriever of its user's fold."""
        made: dict[int, Candidates] = {}
        for fold, retriever in enumerate(self.retrievers):
            rows = [row for row, position in enumerate(positions) if self.fold[position.user] == fold]
            found = retriever.retrieve([positions[row].history for row in rows], self.candidates)
            made.update(zip(rows, found, strict=True))
        return [made[row] for row in range(len(positions))]


def cross_fit(artifacts: Path, data: Data, *, folds: int, candidates: int) -> CrossFit:
    """Train a retriever for each fold of users, with the options of ``artifacts/retriever``, and return them.

    Each retriever is an artifact of its own in ``artifacts/crossfit``, so a second call reuses the finished ones.

    Args:
        artifacts: folder that holds ``data`` and ``retriever``.
        data: the data set in ``artifacts/data``.
        folds: number of folds; each retriever trains on the users of all folds but one.
        candidates: number of candidates in a list.

    Raises:
        InputError: data or retriever are missing.
    """
    options = TrainedRetriever.load(artifacts / "retriever").options
    fold = np.random.default_rng(DEALING_SEED).permutation(len(data.users)) % folds
    retrievers = []
    for number in range(folds):
        others = [user for user, its_fold in zip(data.users, fold, strict=True) if its_fold != number]
        folder = artifacts / FOLDER / f"fold{number + 1}of{folds}"
        retrievers.append(_train(options, artifacts / "data", others, folder))
    return CrossFit(fold, retrievers, candidates)


def _train(options: RetrieverTraining, data: Path, users: list[str], folder: Path) -> TrainedRetriever:
    """Return the retriever in ``folder``, trained on these users only."""
    with PartialState().main_process_first():  # under `accelerate launch` the others find it finished
        _write_users(data, users, folder / "data")
        if options.titles == "model" and not (folder / TITLES).exists():
            (folder / TITLES).symlink_to((data.parent / TITLES).resolve())
    train_retriever(options, folder)
    return TrainedRetriever.load(folder / "retriever")


def _write_users(data: Path, users: list[str], folder: Path) -> None:
    """Write a data artifact with some of the users of ``data`` and all of its items under the same numbers."""
    manifest = read_manifest(data, KIND, "llamarec preprocess")
    inputs, made_with = {"data": manifest.fingerprint}, {"users": users}
    if is_finished(folder, KIND, options=made_with, inputs=inputs):
        return
    table = pa.concat_tables(read_sequences(data))
    kept = table.filter(pc.is_in(table["user"], value_set=pa.array(users, pa.string())))
    whole = Statistics.read(data)
    interactions = int(pc.sum(pc.list_value_length(kept["training"])).as_py()) + 2 * len(kept)
    statistics = Statistics(whole.dataset, len(kept), whole.items, interactions)
    facts = {**manifest.facts, **statistics.row()}
    with new_artifact(folder, KIND, options=made_with, inputs=inputs, facts=facts) as new:
        (new / SEQUENCES_FOLDER).mkdir()
        pq.write_table(kept, new / SEQUENCES_FOLDER / "part_0.parquet")
        (new / ITEMS_FILE).write_bytes((data / ITEMS_FILE).read_bytes())
        (new / STATISTICS_FILE).write_text(json.dumps(statistics.row(), indent=1) + "\n", encoding="utf-8")
