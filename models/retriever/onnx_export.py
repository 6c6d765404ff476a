"""Writes a trained retriever as an ONNX graph with the real arithmetic it was trained in."""

import logging
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from models.retriever.objectives import Retriever


class _LastScores(nn.Module):
    """Left-padded items [batch, length] -> logits of the next item [batch, items + 1]."""

    def __init__(self, model: Retriever) -> None:
        super().__init__()
        self.model = model

    def forward(self, items: Tensor) -> Tensor:
        return self.model.score(self.model(items)[:, -1])


def export_onnx(model: Retriever, length: int, path: Path) -> None:
    """Writes ``path``: ``items`` int64 [batch, length] -> ``scores`` float32 [batch, items + 1], any batch size."""
    # It announces four operators of torchvision that it cannot export, at every export.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    torch.onnx.export(
        _LastScores(model).eval(),
        (torch.zeros((2, length), dtype=torch.int64),),
        path,
        input_names=["items"],
        output_names=["scores"],
        dynamic_shapes={"items": {0: torch.export.Dim("batch")}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    # Each node carries the lines of code it came from, paths included: the same weights should give the same file.
    graph = onnx.load(path)
    for node in (*graph.graph.node, *(node for function in graph.functions for node in function.node)):
        del node.metadata_props[:]
        node.doc_string = ""
    onnx.checker.check_model(graph)
    onnx.save(graph, path)
