"""Exports a trained retriever as the ONNX graph that its step runs, in the same real arithmetic as in training."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx.utils import Extractor
from torch import Tensor, nn

from llamarec_client.contract import MAX_CANDIDATES
from models.retriever.architectures.retriever import Retriever
from models.retriever.inference.index import build_index
from models.retriever.inference.onnx_retriever import INDEX, MODEL, SECOND_MODEL, SETTINGS, STATE_MODEL
from models.retriever.trained import TrainedRetriever
from preprocessing.errors import InputError


class _Last(nn.Module):
    """The part of a retriever that is exported: scores of the next item, and the state they are computed from.

    items [batch, length], left-padded -> logits [batch, items + 1] and state [batch, width].
    """

    def __init__(self, model: Retriever) -> None:
        super().__init__()
        self.model = model

    def forward(self, items: Tensor) -> tuple[Tensor, Tensor]:
        state = self.model.last_state(items)
        return self.model.score(state), state


def export_retriever(
    trained: TrainedRetriever, folder: Path, *, index: bool = False, candidates: int = MAX_CANDIDATES
) -> None:
    """Write the files that :class:`models.retriever.inference.onnx_retriever.OnnxRetriever` loads.

    Args:
        trained: the trained retrieval stage.
        folder: an existing folder.
        index: also write an approximate index, which then replaces the exact search.
        candidates: number of candidates that the retriever hands on.

    Raises:
        InputError: ``index`` is set, and faiss is not installed or there are two retrievers.
    """
    first, *others = trained.models
    if index and others:
        raise InputError(
            "an approximate index searches the items of one retriever, and this one was trained with a second:"
            " export without --index, or train without --second"
        )
    if index:
        build_index(*scoring_vectors(first.model), folder / INDEX)
    # One thread: a pass takes about a millisecond, and the ranker needs the cores.
    settings: dict[str, Any] = {
        "length": first.options.max_length,
        "threads": 1,
        "index": index,
        "candidates": candidates,
    }
    for model, name in zip(trained.models, (MODEL, SECOND_MODEL), strict=False):
        export_onnx(model.model, model.options.max_length, folder / name)
    if others:
        settings["second_length"] = others[0].options.max_length
    if index:
        _write_state_graph(folder)
    if trained.stage.signals is not None:
        trained.stage.signals.save(folder)
    (folder / SETTINGS).write_text(json.dumps(settings) + "\n", encoding="utf-8")


def export_onnx(model: Retriever, length: int, path: Path) -> None:
    """Write the graph: ``items`` int64 [batch, length] -> ``scores`` float32 [batch, items + 1] and ``state``.

    ``state`` is float32 [batch, width]; the scores are computed from it. The weights are in ``<path>.data``: a protobuf
    message cannot exceed 2 GB, and a separate file can be mapped into memory.
    """
    # At every export it warns about four operators of torchvision that it cannot export.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    torch.onnx.export(
        _Last(model).eval(),
        (torch.zeros((2, length), dtype=torch.int64),),
        path,
        input_names=["items"],
        output_names=["scores", "state"],
        dynamic_shapes={"items": {0: torch.export.Dim("batch")}},
        dynamo=True,
        external_data=True,
        verbose=False,
    )
    # Nodes name the source lines they came from, with paths. Without them the same weights give the same file.
    graph = onnx.load(path, load_external_data=False)
    for node in (*graph.graph.node, *(node for function in graph.functions for node in function.node)):
        del node.metadata_props[:]
        node.doc_string = ""
    onnx.save(graph, path)
    onnx.checker.check_model(path)


def _write_state_graph(folder: Path) -> None:
    """Write the same graph up to the state only, because a session computes every node of its graph."""
    whole = onnx.load(folder / MODEL, load_external_data=False)
    onnx.save(Extractor(whole).extract_model(["items"], ["state"]), folder / STATE_MODEL)


def scoring_vectors(model: Retriever) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return embeddings [items + 1, width] and bias [items + 1]; scores are states @ embeddings.T + bias."""
    with torch.no_grad():
        weight, _ = model.head()
        bias = model.score(weight.new_zeros(1, weight.shape[1]))[0]
        return weight.cpu().numpy(), bias.cpu().numpy()
