"""What a retriever learns from a batch of windows: one loss for each way the papers train."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.retriever.architectures.bert4rec import BERT4Rec
from models.retriever.architectures.packing import in_groups
from models.retriever.architectures.retriever import Retriever
from models.retriever.fitting.cross_entropy import cross_entropy


def next_item_loss(model: Retriever, inputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """Full softmax cross-entropy at every position that holds a target.

    Args:
        model: scores the next item.
        inputs: item numbers [batch, length], left-padded.
        targets: what follows each of them [batch, length]; 0 where nothing is to be learnt.

    Returns:
        the sum over the predictions, and how many there are.
    """
    kept = targets > 0
    right = targets[kept]
    return cross_entropy(model.states_at(inputs, kept), *model.head(), right), len(right)


def binary_loss(model: Retriever, inputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """SASRec's own: the target against one random other item, by binary cross-entropy (ICDM 2018, equation 6).

    Args, returns: see :func:`next_item_loss`.
    """
    kept = targets > 0
    right = targets[kept]
    vectors, bias = model.head()
    # Any item but the right one: a step of 1 to items - 1 round the circle of the items.
    items = len(vectors) - 1
    wrong = (right - 1 + torch.randint(1, items, right.shape, device=right.device)) % items + 1
    pairs = torch.stack((right, wrong), dim=1)  # [kept, 2]
    scores = (F.embedding(pairs, vectors) * model.states_at(inputs, kept).unsqueeze(1)).sum(dim=-1)
    if bias is not None:
        scores = scores + bias[pairs]
    truth = torch.tensor([1.0, 0.0], device=scores.device).expand_as(scores)
    return F.binary_cross_entropy_with_logits(scores, truth, reduction="sum") / 2, len(right)


def cloze_loss(model: BERT4Rec, _: Tensor, targets: Tensor, masked_share: float) -> tuple[Tensor, int]:
    """Masked items are filled in; in every tenth window it is the last one alone (CIKM 2019, sections 3.6 and 3.7).

    Args:
        model: fills in.
        targets: item numbers [batch, length], left-padded.
        masked_share: of the items, the probability of each.

    Returns:
        the sum over the masked items, and how many there are.
    """
    is_item = targets > 0
    masked = is_item & (torch.rand(targets.shape, device=targets.device) < masked_share)
    last_only = torch.rand(len(targets), device=targets.device) < 0.1
    last_only |= ~masked.any(dim=1)  # at least one each
    masked[last_only] = False
    masked[last_only, -1] = is_item[last_only, -1]
    states = in_groups(model.encode, targets.masked_fill(masked, model.mask), is_item)[masked[is_item]]
    right = targets[masked]
    return cross_entropy(states, *model.head(), right), len(right)


Loss = Callable[[Any, Tensor, Tensor], tuple[Tensor, int]]
"""Of a model, inputs and targets, both [batch, length]: the sum over the predictions, and how many there are."""
