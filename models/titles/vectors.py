"""The artifact of title vectors that a language model encoded, which a retriever's training reads.

:mod:`models.ranker.title_states` writes it where the base model is.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from preprocessing.artifacts import read_manifest
from preprocessing.errors import InputError

KIND = "titles"
VECTORS_FILE = "titles.safetensors"
COMMAND = "llamarec train-retriever --titles model"


def save_vectors(folder: Path, vectors: NDArray[np.float32]) -> None:
    """Write title vectors [items + 1, dimensions], the padding's first, into an existing folder."""
    save_file({"vectors": vectors}, folder / VECTORS_FILE)


def load_vectors(folder: Path, items: int) -> NDArray[np.float32]:
    """Return the title vectors [items + 1, dimensions] of an artifact.

    Args:
        folder: the artifact's folder.
        items: size of the catalogue.

    Raises:
        InputError: the artifact is missing, or has vectors of another number of items.
    """
    read_manifest(folder, KIND, COMMAND)
    vectors: NDArray[np.float32] = load_file(folder / VECTORS_FILE)["vectors"]
    if len(vectors) != items + 1:
        raise InputError(
            f"{folder} has vectors of {len(vectors) - 1:,} titles, and the catalogue has {items:,} items:"
            f" delete it and run `{COMMAND}`"
        )
    return vectors
