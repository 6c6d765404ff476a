"""Adds what a training learned of titles to the items' vectors, so that the model is served as one without titles."""

from dataclasses import replace

import torch
from torch import Tensor

from models.retriever.architectures.build import build_model
from models.retriever.architectures.retriever import Retriever
from models.retriever.options import RetrieverTraining
from models.retriever.trained import TrainedModel

PROJECTION = "embedding.projection.weight"


def with_sums(model: Retriever, options: RetrieverTraining, trained: int, titles: Tensor | None) -> TrainedModel:
    """Return the same model with one vector per item: the sum of its own vector and its title's projection.

    Items that were not trained get the projection alone, and the lowest bias of a trained item.

    Args:
        model: the trained model.
        options: options of its training.
        trained: number of items that it was trained with.
        titles: title vectors of all items to retrieve [items + 1, dimensions], the padding's first; None for a model
            without titles.
    """
    if titles is None:
        return TrainedModel(model.eval(), options, trained)
    state, items = dict(model.state_dict()), len(titles) - 1
    own, projection = state["embedding.weight"], state.pop(PROJECTION)
    # BERT4Rec has one more row, for its mask.
    rows, others = own[: trained + 1], own[trained + 1 :]
    vectors = torch.cat((rows, rows.new_zeros(items - trained, rows.shape[1]))) + titles @ projection.T
    state["embedding.weight"] = torch.cat((vectors, others))
    if "bias" in state:
        bias = state["bias"]
        state["bias"] = torch.cat((bias, bias[1:].min().expand(items - trained)))
    served = build_model(replace(options, titles="none"), items)
    served.load_state_dict(state)
    return TrainedModel(served.eval(), options, items)
