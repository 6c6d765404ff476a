"""Full softmax cross-entropy over the whole catalogue, without ever holding the logits of a batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 1 << 20
"""Logits computed at once: 4 MiB, which a processor's cache holds."""


class _CrossEntropy(torch.autograd.Function):
    """Computes the gradient together with the loss, a chunk of predictions at a time, and keeps only the gradient."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        grad_states, grad_weight = torch.empty_like(states), torch.zeros_like(weight)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        rows = max(1, CHUNK // len(weight))
        buffer = states.new_empty((min(rows, len(states)), len(weight)))
        losses = []
        for x, grad, target in zip(states.split(rows), grad_states.split(rows), targets.split(rows), strict=True):
            logits = buffer[: len(x)]
            if bias is None:
                torch.mm(x, weight.t(), out=logits)
            else:
                torch.addmm(bias, x, weight.t(), out=logits)
            right = logits.gather(1, target.unsqueeze(1)).squeeze(1)
            highest = logits.amax(dim=1)
            powers = logits.sub_(highest.unsqueeze(1)).exp_()  # [rows, items]
            total = powers.sum(dim=1)
            losses.append(total.log() + highest - right)
            # Gradient of the logits: powers / total, less 1 at the target; neither is written out.
            share = total.reciprocal_().unsqueeze(1)
            torch.mm(powers, weight, out=grad)
            grad.mul_(share).sub_(weight[target])
            grad_weight.addmm_(powers.t(), x * share)
            if grad_bias is not None:
                grad_bias.addmv_(powers.t(), share.squeeze(1))
        grad_weight.index_add_(0, targets, states, alpha=-1)
        if grad_bias is not None:
            grad_bias.index_add_(0, targets, torch.ones_like(states[:, 0]), alpha=-1)
        ctx.save_for_backward(grad_states, grad_weight, *(() if grad_bias is None else (grad_bias,)))
        return torch.cat(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_states, grad_weight, *rest = ctx.saved_tensors
        return grad_states * grad, grad_weight * grad, rest[0] * grad if rest else None, None


def cross_entropy(states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Sum over all predictions of -log softmax(states @ weight.T + bias)[target].

    The same number and gradients as ``torch.nn.functional.cross_entropy(..., reduction="sum")`` of the logits, up to
    rounding. Memory and its traffic are those of a chunk of the logits; the gradient cannot be differentiated again.

    Args:
        states: [predictions, width].
        weight: [items, width].
        bias: [items], or none.
        targets: [predictions] item numbers.
    """
    apply: Callable[..., Tensor] = _CrossEntropy.apply  # it has no types of its own
    return apply(states, weight, bias, targets)
