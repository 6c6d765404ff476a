"""Made-up data and a retriever's candidates, from which a ranker is trained in a second."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from models.ranker import training
from models.retriever.candidates import Candidates, CandidateTable, CandidateWriter
from preprocessing.artifacts import new_artifact, read_manifest
from preprocessing.catalogue import Catalogue

ITEMS = 30
CATALOGUE = Catalogue(
    [f"{item}".encode() for item in range(ITEMS)], [f"Film number {item}" for item in range(ITEMS)], [1] * ITEMS
)


def candidate_table(truths: list[int]) -> CandidateTable:
    """Return a table with items 1 to 20 for every user, in that order."""
    scores = np.linspace(2, 0, 20, dtype=np.float32)
    row = Candidates(np.arange(1, 21, dtype=np.int32), scores, np.arange(1, 21, dtype=np.int32))
    users = [f"u{place}" for place in range(len(truths))]
    places = np.array(truths, np.int32)
    return CandidateTable(users, [row] * len(truths), places, places, places)


def write_candidates(path: Path, table: CandidateTable) -> None:
    with CandidateWriter(path) as writer:
        writer.write(table.users, table.candidates, table.truth, table.ranks, table.model_ranks)


def made_up(histories: list[np.ndarray]) -> SimpleNamespace:
    """Return data of users u0, u1, ... with these training sequences."""
    users = [f"u{place}" for place in range(len(histories))]
    return SimpleNamespace(name="made-up", catalogue=CATALOGUE, users=users, training=histories)


def write_artifacts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write artifacts of four users, and return the folder; for two of them, the true item is among the candidates."""
    truths = [3, 5, 25, 26]
    with new_artifact(folder / "data", "data", options={}, inputs={}) as data:
        (data / "made-up").write_text("")
    fingerprint = read_manifest(folder / "data", "data", "").fingerprint
    with new_artifact(folder / "retriever", "retriever", options={}, inputs={"data": fingerprint}) as retriever:
        write_candidates(retriever / "candidates-validation.parquet", candidate_table(truths))
    histories = [np.arange(20, 30, dtype=np.int32)] * 4
    monkeypatch.setattr(training, "load_data", lambda artifacts: made_up(histories))
    return folder
