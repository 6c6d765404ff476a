"""Builds the retriever architecture that the options name."""

from collections.abc import Callable, Mapping
from typing import Any

from models.retriever.architectures.bert4rec import BERT4Rec
from models.retriever.architectures.lrurec import LRURec
from models.retriever.architectures.narm import NARM
from models.retriever.architectures.retriever import Retriever
from models.retriever.architectures.sasrec import SASRec
from models.retriever.options import RetrieverTraining

MODELS: Mapping[str, Callable[[RetrieverTraining, int], Any]] = {
    "lrurec": lambda o, items: LRURec(items, o.width, o.blocks, o.dropout),
    "sasrec": lambda o, items: SASRec(items, o.max_length, o.width, o.blocks, o.heads, o.dropout),
    "bert4rec": lambda o, items: BERT4Rec(items, o.max_length, o.width, o.blocks, o.heads, o.dropout),
    "narm": lambda o, items: NARM(items, o.width, o.blocks, o.dropout),
}
"""Builders of the architectures, by their name in ``--model``; each takes the options and the number of items."""


def build_model(options: RetrieverTraining, items: int) -> Retriever:
    """Return a newly initialised model of the architecture that the options name."""
    model: Retriever = MODELS[options.model](options, items)
    return model
