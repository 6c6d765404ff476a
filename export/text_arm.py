"""Exports what the retrievers learned of titles, so that items can be added while the server runs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from export.onnx_graph import scoring_vectors
from models.retriever.inference.added import TextArm
from models.retriever.inference.onnx_retriever import SECOND_TEXT_ARM, TEXT_ARM
from models.retriever.trained import PROJECTION_FILE, SECOND, TrainedRetriever
from models.titles.words import VOCABULARY_FILE, WordEncoder
from preprocessing.catalogue import ITEMS_FILE, Catalogue


def reads_titles(artifact: Path, trained: TrainedRetriever) -> bool:
    """Return whether every retriever of an artifact can score a new item by the words of its title.

    Not so if one was trained without titles, with those that a language model encoded, to retrieve trained items only,
    or by a version that did not record the items.
    """
    items = artifact / ITEMS_FILE
    whole = items.is_file() and trained.models[0].items == len(Catalogue.load(items))
    return whole and all(
        (folder / name).is_file()
        for folder in _folders(artifact, trained)
        for name in (PROJECTION_FILE, VOCABULARY_FILE)
    )


def export_text_arms(artifact: Path, trained: TrainedRetriever, folder: Path) -> None:
    """Write the text arm of each retriever into the retriever step's folder, if :func:`reads_titles`."""
    if not reads_titles(artifact, trained):
        return
    catalogue = Catalogue.load(artifact / ITEMS_FILE)
    names = (TEXT_ARM, SECOND_TEXT_ARM)
    for source, model, name in zip(_folders(artifact, trained), trained.models, names, strict=False):
        vectors, bias = scoring_vectors(model.model)
        projection = load_file(source / PROJECTION_FILE)["projection"].astype(np.float32)
        arm = TextArm(WordEncoder.load(source), projection, float(bias[1:].min()), catalogue.trained, vectors)
        (folder / name).mkdir()
        arm.save(folder / name)


def _folders(artifact: Path, trained: TrainedRetriever) -> Sequence[Path]:
    return [artifact, artifact / SECOND][: len(trained.models)]
