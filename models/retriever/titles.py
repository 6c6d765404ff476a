"""The title vectors that a retriever is trained with."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.retriever.options import RetrieverTraining
from models.titles.fit_words import fit_words
from models.titles.vectors import COMMAND, KIND, load_vectors
from models.titles.words import WordEncoder
from preprocessing.artifacts import read_manifest
from preprocessing.data import Data
from preprocessing.errors import InputError


@dataclass(frozen=True)
class Titles:
    """What a training reads of the catalogue's titles."""

    vectors: NDArray[np.float32] | None
    """Vectors of all items' titles [items + 1, dimensions], the padding's first; None for a training without titles."""
    encoder: WordEncoder | None
    """Encoder by which titles become vectors, for a training with the titles' words."""

    def trained(self, data: Data) -> NDArray[np.float32] | None:
        """Return the vectors of the trained items [trained + 1, dimensions]."""
        return None if self.vectors is None else self.vectors[: data.catalogue.trained + 1]

    def retrieved(self, options: RetrieverTraining, data: Data) -> Tensor | None:
        """Return the vectors of the items that are to be retrieved [items + 1, dimensions]."""
        vectors = self.vectors if options.whole_catalogue else self.trained(data)
        return None if vectors is None else torch.from_numpy(vectors)


def encode_titles(
    options: RetrieverTraining, data: Data, artifacts: Path, earlier: WordEncoder | None = None
) -> Titles:
    """Return the title vectors of a training.

    Words and their frequencies are learned from the titles of trained items only, so that an untrained item is encoded
    in the same way as one that is added later.

    Args:
        options: options of the training.
        data: the data that it trains on.
        artifacts: folder that holds the data.
        earlier: encoder of the retriever that the training goes on from, whose projection fits no other.

    Raises:
        InputError: no word occurs in two titles, or a language model's vectors are missing.
    """
    if options.titles == "none":
        return Titles(None, None)
    if options.titles == "model":
        return Titles(load_vectors(artifacts / KIND, len(data.catalogue)), None)
    titles = all_titles(data)
    encoder = earlier or fit_words(titles[: data.catalogue.trained])
    if not encoder.components.size:
        raise InputError(
            f"no two words of the titles in {artifacts / 'data'} occur in two titles each, so titles say nothing of how"
            " items resemble each other: train with --titles none, or give the items titles"
        )
    return Titles(encoder.vectors(encoder.rows(["", *titles])), encoder)


def training_inputs(options: RetrieverTraining, artifacts: Path) -> dict[str, str]:
    """Return the fingerprint of each artifact that a training reads, by name.

    Raises:
        InputError: one of them is missing.
    """
    inputs = {"data": read_manifest(artifacts / "data", "data", "llamarec preprocess").fingerprint}
    if options.titles == "model":
        inputs[KIND] = read_manifest(artifacts / KIND, KIND, COMMAND).fingerprint
    return inputs


def all_titles(data: Data) -> list[str]:
    """Return the titles of all items of the catalogue, in the order of the item numbers."""
    return [data.catalogue.title(item) for item in range(1, len(data.catalogue) + 1)]
