"""The artifact of a language model's title vectors: it reads back as written, and is refused if it does not fit."""

from pathlib import Path

import numpy as np
import pytest

from models.titles.vectors import KIND, load_vectors, save_vectors
from preprocessing.artifacts import new_artifact
from preprocessing.errors import InputError


def write(folder: Path, vectors: np.ndarray) -> Path:
    with new_artifact(folder, KIND, options={}, inputs={}) as partial:
        save_vectors(partial, vectors)
    return folder


def test_vectors_read_back_as_written(tmp_path: Path):
    """The vectors of four items, and a row of zeros for the padding, to the last bit."""
    vectors = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    np.testing.assert_array_equal(load_vectors(write(tmp_path / "titles", vectors), 4), vectors)


def test_vectors_of_another_catalogue_are_refused(tmp_path: Path):
    """An item's number would mean another item's title; the error gives both numbers of items and the remedy."""
    folder = write(tmp_path / "titles", np.zeros((5, 3), np.float32))
    with pytest.raises(InputError, match=r"vectors of 4 titles, and the catalogue has 7 items: delete it and run `"):
        load_vectors(folder, 7)


def test_missing_vectors_name_the_command(tmp_path: Path):
    """Without the artifact, the error names the command that writes it."""
    with pytest.raises(InputError, match=r"titles does not exist.*run `llamarec train-retriever --titles model` first"):
        load_vectors(tmp_path / "titles", 4)
