"""The losses of a retriever on a batch of windows, one for each training method of the papers.

Batches are on the processor, whatever the model's device is: there it is known which positions and items are computed,
so that no step waits for a GPU.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.device import sent
from models.retriever.architectures.bert4rec import BERT4Rec
from models.retriever.architectures.packing import in_groups
from models.retriever.architectures.retriever import Retriever
from models.retriever.fitting.cross_entropy import cross_entropy


def next_item_loss(model: Retriever, inputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """Return the full softmax cross-entropy at every position that has a target.

    Args:
        model: the retriever.
        inputs: item numbers [batch, length], left-padded, on the processor.
        targets: number of the item after each input [batch, length]; 0 where there is no target.

    Returns:
        the sum over the predictions, and the number of predictions.
    """
    kept = targets > 0
    right = targets[kept]
    states = model.states_at(inputs, kept)
    return cross_entropy(states, *model.head(), sent(right, states.device)), len(right)


def sampled_loss(
    model: Retriever, inputs: Tensor, targets: Tensor, negatives: int, popularity: Tensor
) -> tuple[Tensor, int]:
    """Return an estimate of :func:`next_item_loss` from a sample of the catalogue.

    All predictions share one sample: random items, and the targets of the batch, which are items that the model has to
    tell apart (mixed negative sampling, Yang et al., WWW 2020). Each item counts by the inverse of its probability to
    be in the sample, so that the softmax's denominator is estimated without bias, given that targets are drawn
    independently. The padding, which no target is, takes no part.

    Args:
        model: the retriever.
        inputs: item numbers [batch, length], left-padded, on the processor.
        targets: number of the item after each input [batch, length]; 0 where there is no target.
        negatives: number of random items.
        popularity: share of each item among all targets of the training [items + 1].

    Returns:
        the sum over the predictions, and the number of predictions.
    """
    kept = targets > 0
    right = targets[kept]
    count = len(popularity) - 1
    drawn = 1 + torch.randperm(count)[:negatives]  # never the padding
    items, places = torch.unique(torch.cat((right, drawn)), return_inverse=True)
    absent = torch.log1p(-popularity[items]) * len(right)  # logarithm of the probability that no target is the item
    included = 1 - (1 - min(negatives / count, 1)) * absent.exp()
    states = model.states_at(inputs, kept)
    items, places, drawn = (sent(x, states.device) for x in (items, places[: len(right)], included.log()))
    return cross_entropy(states, *model.head(items), places, drawn), len(right)


def binary_loss(model: Retriever, inputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """Return SASRec's own loss: binary cross-entropy of the target and one random other item (ICDM 2018, equation 6).

    See :func:`next_item_loss` for the arguments and the result.
    """
    kept = targets > 0
    right = targets[kept]
    vectors, bias = model.head()
    # A random item other than the target: the target plus 1 to items - 1, modulo the number of items.
    items = len(vectors) - 1
    wrong = (right - 1 + torch.randint(1, items, right.shape)) % items + 1
    pairs = sent(torch.stack((right, wrong), dim=1), vectors.device)  # [kept, 2]
    scores = (F.embedding(pairs, vectors) * model.states_at(inputs, kept).unsqueeze(1)).sum(dim=-1)
    if bias is not None:
        scores = scores + bias[pairs]
    truth = sent(torch.tensor([1.0, 0.0]), scores.device).expand_as(scores)
    return F.binary_cross_entropy_with_logits(scores, truth, reduction="sum") / 2, len(right)


def cloze_loss(model: BERT4Rec, _: Tensor, targets: Tensor, masked_share: float) -> tuple[Tensor, int]:
    """Return the cross-entropy of masked items; in every tenth window only the last item is masked.

    Source: BERT4Rec (CIKM 2019), sections 3.6 and 3.7.

    Args:
        model: the retriever.
        targets: item numbers [batch, length], left-padded.
        masked_share: probability with which each item is masked.

    Returns:
        the sum over the masked items, and the number of masked items.
    """
    is_item = targets > 0
    masked = is_item & (torch.rand(targets.shape) < masked_share)
    last_only = torch.rand(len(targets)) < 0.1
    last_only |= ~masked.any(dim=1)  # mask at least one item of each window
    masked[last_only] = False
    masked[last_only, -1] = is_item[last_only, -1]
    device = model.bias.device
    states = in_groups(model.encode, targets.masked_fill(masked, model.mask), is_item, device)
    states = states[sent(masked[is_item].nonzero().squeeze(1), device)]
    right = targets[masked]
    return cross_entropy(states, *model.head(), sent(right, device)), len(right)


Loss = Callable[[Any, Tensor, Tensor], tuple[Tensor, int]]
"""Function of a model, inputs and targets [batch, length] that returns the loss, summed over the predictions, and the
number of predictions."""
