"""Builds the retriever architecture that the options name."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from models.retriever.architectures.bert4rec import BERT4Rec
from models.retriever.architectures.lrurec import LRURec
from models.retriever.architectures.narm import NARM
from models.retriever.architectures.retriever import Retriever
from models.retriever.architectures.sasrec import SASRec
from models.retriever.options import RetrieverTraining

MODELS: Mapping[str, Callable[[RetrieverTraining, int, Tensor | None], Any]] = {
    "lrurec": lambda o, items, titles: LRURec(items, o.width, o.blocks, o.dropout, titles),
    "sasrec": lambda o, items, titles: SASRec(items, o.max_length, o.width, o.blocks, o.heads, o.dropout, titles),
    "bert4rec": lambda o, items, titles: BERT4Rec(items, o.max_length, o.width, o.blocks, o.heads, o.dropout, titles),
    "narm": lambda o, items, titles: NARM(items, o.width, o.blocks, o.dropout, titles),
}
"""Builders of the architectures, by their name in ``--model``; the arguments are those of :func:`build_model`."""


def build_model(options: RetrieverTraining, items: int, titles: Tensor | None = None) -> Retriever:
    """Return a newly initialised model of the architecture that the options name.

    Args:
        options: see :class:`RetrieverTraining`.
        items: number of items.
        titles: vectors of the items' titles; see :class:`models.retriever.architectures.item_embedding.ItemEmbedding`.
    """
    model: Retriever = MODELS[options.model](options, items, titles)
    return model
