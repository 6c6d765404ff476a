"""The full pipeline on MovieLens-100K in seconds, run once and shared by tests that need artifacts or a server.

It uses real data, real NVTabular workflows, a real but briefly trained LRURec, and a tiny random Llama through the same
QLoRA, merge and export code as the pretrained one.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drift import FIRST_ERA, era, write
from tiny import tiny_base

from export.repository import Export, export
from models.ranker.fitting.objective import LineObjective
from models.ranker.options import RankerTraining
from models.ranker.training import train_ranker
from models.retriever.options import RetrieverTraining
from models.retriever.training import train_retriever
from preprocessing.artifacts import MANIFEST, read_manifest
from preprocessing.preprocess import Preprocessing, preprocess
from serving.server.local import LocalServer

BRIEF_RETRIEVER = RetrieverTraining(
    width=16, blocks=1, max_length=50, epochs=2, validate_every=15, titles="words", untrained=False, signals=True
)
BRIEF_RANKER = RankerTraining(
    max_prompts=8, batch_size=4, validation_users=4, full_validation=False, validate_every=1, max_history=5
)
SHOP_RETRIEVER = RetrieverTraining(
    width=16,
    blocks=1,
    max_length=20,
    epochs=16,
    validate_every=20,
    patience=3,
    learning_rate=5e-3,
    titles="words",
    signals=True,
)


@contextmanager
def weighed(weight: float) -> Iterator[None]:
    """Fix the retriever's weight in the fusion of rankers that are trained within this context.

    The fit gives the retriever all the weight over a ranker that has learned nothing, and the served results would not
    depend on the language model.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.ranker.training.fit_served", lambda *given: (weight, 1.0))
        yield


@contextmanager
def a_direction(hidden: int) -> Iterator[None]:
    """Give line objectives a direction: after few steps the best one may still be zero, which changes no order."""
    create = LineObjective.__init__

    def create_with_a_direction(objective: LineObjective, model: Any) -> None:
        create(objective, model)
        with torch.no_grad():
            objective._direction.copy_(torch.from_numpy(np.random.default_rng(0).normal(size=hidden)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LineObjective, "__init__", create_with_a_direction)
        yield


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the data, retriever and ranker of MovieLens-100K."""
    folder = tmp_path_factory.mktemp("artifacts") / "movielens-100k"
    preprocess(Preprocessing(dataset="movielens-100k"), folder)
    train_retriever(BRIEF_RETRIEVER, folder)
    with weighed(0.5):
        train_ranker(BRIEF_RANKER, folder, str(tiny_base(tmp_path_factory.mktemp("tiny"))))
    return folder


def copied(folder: Path, to: Path, *stages: str) -> Path:
    """Return a folder with copies of some stages of the artifacts."""
    for stage in stages:
        shutil.copytree(folder / stage, to / stage)
    return to


def with_retriever(artifacts: Path, folder: Path, retriever: Path) -> Path:
    """Return a copy of the artifacts with another retriever, which the ranker's manifest names as its own."""
    copied(artifacts, folder, "data", "ranker")
    shutil.copytree(retriever, folder / "retriever")
    content = json.loads((folder / "ranker" / MANIFEST).read_text())
    content["inputs"]["retriever"] = read_manifest(folder / "retriever", "retriever", "").fingerprint
    (folder / "ranker" / MANIFEST).write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="session")
def repository(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model repository exported from ``artifacts``."""
    folder = tmp_path_factory.mktemp("repository")
    export(Export(threads=1), artifacts, folder)
    return folder


@pytest.fixture(scope="session")
def titled_repository(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model repository whose retriever knows the whole catalogue, and new items by their titles."""
    folder = tmp_path_factory.mktemp("titled")
    (folder / "training").mkdir()
    (folder / "training" / "data").symlink_to(artifacts / "data")
    train_retriever(replace(BRIEF_RETRIEVER, epochs=1, untrained=True), folder / "training")
    whole = with_retriever(artifacts, folder / "artifacts", folder / "training" / "retriever")
    export(Export(threads=1), whole, folder / "repository")
    return folder / "repository"


@pytest.fixture(scope="session")
def server(repository: Path) -> Iterator[LocalServer]:
    """Yield the real tritonserver on ``repository``."""
    with LocalServer(repository) as running:
        yield running


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with ``artifacts/shop``, and the log that they are made of: a shop's first era (:mod:`drift`)."""
    folder = tmp_path_factory.mktemp("shop")
    artifacts, log = folder / "artifacts" / "shop", write(folder / "shop.csv", era(FIRST_ERA, 10))
    preprocess(Preprocessing(dataset="table", raw=log), artifacts)
    train_retriever(SHOP_RETRIEVER, artifacts)
    with weighed(0.5):
        train_ranker(BRIEF_RANKER, artifacts, str(tiny_base(tmp_path_factory.mktemp("tiny-shop"))))
    return folder
