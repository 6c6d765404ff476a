"""Goes on from an earlier retriever: its weights for the items that it knows, and titles for the new ones."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.retriever.architectures.build import build_model
from models.retriever.fitting.sums import PROJECTION
from models.retriever.options import RetrieverTraining
from models.retriever.titles import Titles
from models.retriever.trained import PROJECTION_FILE, TrainedModel
from preprocessing.catalogue import ITEMS_FILE, Catalogue
from preprocessing.data import Data
from preprocessing.errors import InputError

SAME = ("model", "titles", "width", "blocks", "heads", "max_length")
"""Options that a training and the one that it goes on from must share."""


def earlier_state(folder: Path, options: RetrieverTraining, data: Data, titles: Titles) -> dict[str, Tensor]:
    """Return the state from which a training goes on; items are matched by their raw ids.

    An item that the earlier retriever was not trained with starts with the vector of its title alone, or without titles
    with a random vector, and with the lowest bias.

    Args:
        folder: the earlier retriever's artifact, or the subfolder of its second model.
        options: options of the training.
        data: the data that it trains on.
        titles: titles, encoded as for the earlier retriever.

    Raises:
        InputError: the earlier retriever has another architecture, or does not record its items.
    """
    if not (folder / ITEMS_FILE).is_file():
        raise InputError(
            f"{folder} does not record which items it was trained with, because an earlier version made it:"
            " train once without --from"
        )
    earlier = TrainedModel.load(folder)
    for name in SAME:
        found, wanted = getattr(earlier.options, name), getattr(options, name)
        if found != wanted:
            raise InputError(
                f"{folder} was trained with {name} {found}, not {wanted}: give that, or train without --from"
            )
    torch.manual_seed(options.seed)
    count = data.catalogue.trained
    vectors = None if titles.vectors is None else torch.from_numpy(titles.vectors[: count + 1])
    state = dict(build_model(options, count, vectors).state_dict())
    known = dict(earlier.model.state_dict())
    new, old = _matched(Catalogue.load(folder / ITEMS_FILE), data.catalogue)
    sums, own = known.pop("embedding.weight"), state["embedding.weight"]
    # The padding's row, and BERT4Rec's row for the mask, which is its last.
    rows = torch.cat((torch.tensor([0]), new, torch.arange(count + 1, len(own))))
    places = torch.cat((torch.tensor([0]), old, torch.arange(earlier.items + 1, len(sums))))
    if vectors is not None:
        projection = load_file(folder / PROJECTION_FILE)["projection"]
        state[PROJECTION] = projection
        own.zero_()
        own[rows] = sums[places]
        own[: count + 1] -= _only(new, count, vectors @ projection.T)
    else:
        own[rows] = sums[places]
    if "bias" in known:
        bias = known.pop("bias")
        state["bias"] = bias[1:].min().repeat(count + 1)
        state["bias"][torch.cat((torch.tensor([0]), new))] = bias[torch.cat((torch.tensor([0]), old))]
    return {**state, **known}


def _matched(earlier: Catalogue, now: Catalogue) -> tuple[Tensor, Tensor]:
    """Return the numbers, now and earlier, of the items that were trained earlier and are trained now."""
    pairs = [
        (number, item)
        for item in range(1, earlier.trained + 1)
        if (number := now.number(earlier.raw(item))) is not None and number <= now.trained
    ]
    matched = torch.from_numpy(np.array(pairs, np.int64).reshape(-1, 2))
    return matched[:, 0], matched[:, 1]


def _only(items: Tensor, count: int, vectors: Tensor) -> Tensor:
    """Return the vectors [count + 1, width] with zeros for all but some items."""
    kept = torch.zeros(count + 1, 1)
    kept[items] = 1
    return vectors * kept
