"""What a retriever learns from a batch of windows: one loss for each way the papers train."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from models.retriever.bert4rec import BERT4Rec

MASKED_SHARE = 0.2
"""Share of the items that BERT4Rec fills in (Sun et al. 2019, section 4.5, for data of this density)."""


class Retriever(Protocol):
    """What every architecture offers."""

    training: bool

    def __call__(self, items: Tensor) -> Tensor:
        """Left-padded item numbers [batch, length] -> states [batch, length, width], the last one of what follows."""
        ...

    def score(self, states: Tensor) -> Tensor:
        """States [..., width] -> logits of every item number, the padding's included [..., items + 1]."""
        ...


def next_item_loss(model: Retriever, inputs: Tensor, targets: Tensor) -> Tensor:
    """Full softmax cross-entropy at every position that holds a target.

    Columns that are padding in the whole batch are left out, and so are the logits of padded positions: the loss is the
    same, and most of the time is saved where sequences are short.

    Args:
        model: scores the next item.
        inputs: item numbers [batch, length], left-padded.
        targets: what follows each of them [batch, length]; 0 where nothing is to be learnt.
    """
    kept = targets > 0
    longest = int(kept.sum(dim=1).max())
    kept = kept[:, -longest:]
    states = model(inputs[:, -longest:])[kept]  # [kept, width]
    return F.cross_entropy(model.score(states), targets[:, -longest:][kept])


def binary_loss(model: Retriever, inputs: Tensor, targets: Tensor) -> Tensor:
    """SASRec's own: the target against one random other item, by binary cross-entropy (ICDM 2018, equation 6).

    Args: see :func:`next_item_loss`.
    """
    kept = targets > 0
    longest = int(kept.sum(dim=1).max())
    kept, targets = kept[:, -longest:], targets[:, -longest:]
    logits = model.score(model(inputs[:, -longest:])[kept])  # [kept, items + 1]
    right = targets[kept].unsqueeze(1)
    # Any item but the right one: a step of 1 to items - 1 round the circle of the items.
    items = logits.shape[1] - 1
    wrong = (right - 1 + torch.randint(1, items, right.shape, device=right.device)) % items + 1
    scores = torch.cat((logits.gather(1, right), logits.gather(1, wrong)), dim=1)
    truth = torch.tensor([1.0, 0.0], device=scores.device).expand_as(scores)
    return F.binary_cross_entropy_with_logits(scores, truth)


def cloze_loss(model: BERT4Rec, _: Tensor, targets: Tensor) -> Tensor:
    """Masked items are filled in; in every tenth window it is the last one alone (CIKM 2019, sections 3.6 and 3.7).

    Args:
        model: fills in.
        targets: item numbers [batch, length], left-padded.
    """
    is_item = targets > 0
    masked = is_item & (torch.rand(targets.shape, device=targets.device) < MASKED_SHARE)
    last_only = torch.rand(len(targets), device=targets.device) < 0.1
    last_only |= ~masked.any(dim=1)  # at least one each
    masked[last_only] = False
    masked[last_only, -1] = is_item[last_only, -1]
    states = model.encode(targets.masked_fill(masked, model.mask))[masked]
    return F.cross_entropy(model.score(states), targets[masked])


Loss = Callable[[Any, Tensor, Tensor], Tensor]
"""Of a model, inputs and targets, both [batch, length]."""
