"""Computes LRURec's training loss as its authors do, with the parameters of our model: the baseline of our step.

The authors use complex arithmetic, a scan over the whole padded length, and logits of every item at every position,
including the padding.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from models.retriever.architectures.lrurec import LinearRecurrence, LRUBlock, LRURec


def authors_loss(model: LRURec, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy over the positions with a target; inputs and targets are items [batch, length]."""
    logits = authors_logits(model, inputs)  # [batch, length, items + 1]
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=0)


def authors_logits(model: LRURec, inputs: Tensor) -> Tensor:
    """Return the logits [batch, length, items + 1] at every position."""
    length = inputs.shape[1]
    longer = 1 << (length - 1).bit_length()  # the scan doubles its block length
    inputs = F.pad(inputs, (longer - length, 0))
    x = model.embedding_norm(model.dropout(model.embedding(inputs)))
    for block in model.blocks:
        assert isinstance(block, LRUBlock)
        x = _block(block, x, inputs > 0)
    return F.linear(x[:, -length:], model.embedding.weight, model.bias)


def _block(block: LRUBlock, x: Tensor, is_item: Tensor) -> Tensor:
    x = block.recurrence_norm(x + block.dropout(_recurrence(block.recurrence, x, is_item)))
    output: Tensor = block.feed_forward_norm(x + block.dropout(block.feed_forward(x)))
    return output


def _recurrence(layer: LinearRecurrence, x: Tensor, is_item: Tensor) -> Tensor:
    decay = torch.exp(torch.complex(-torch.exp(layer.decay_log), torch.exp(layer.phase_log)))  # [state]
    states = len(decay)
    into = torch.complex(*layer.project_in.weight.split(states))  # [state, width]
    bias = torch.complex(*layer.project_in.bias.split(states))
    h = (F.linear(x.to(into.dtype), into, bias) * torch.exp(layer.scale_log)) * is_item.unsqueeze(-1)
    batch, length, _ = h.shape
    reach = 1
    while reach < length:
        # In each pair of blocks of `reach` positions, the second adds the end of the first, decayed by the distance.
        h = h.reshape(batch * length // (2 * reach), 2 * reach, states)
        powers = decay ** torch.arange(1, reach + 1, device=x.device).unsqueeze(-1)  # [reach, state]
        first, second = h[:, :reach], h[:, reach:]
        h = torch.cat((first, second + powers * first[:, -1:]), dim=1)
        reach *= 2
    h = h.reshape(batch, length, states)
    out_real, out_imaginary = layer.project_out.weight.split(states, dim=1)  # Re(C h) = Re C Re h - Im C Im h
    out = torch.complex(out_real, -out_imaginary)
    output: Tensor = F.linear(h, out).real + layer.project_out.bias
    return output
