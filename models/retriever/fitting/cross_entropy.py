"""Computes the softmax cross-entropy over the catalogue, or a sample, without holding a batch's logits in memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 1 << 20
"""Number of logits computed at once on a processor: 4 MiB, which fits its cache."""
GPU_CHUNK = 1 << 28
"""Maximum number of logits computed at once on a GPU, which small products leave idle: 1 GiB."""
GPU_SHARE = 16
"""Part of a GPU's memory that the logits may take: a sixteenth."""


def chunk_of(device: torch.device) -> int:
    """Return the number of logits that are computed at once on a device."""
    if device.type != "cuda":
        return CHUNK
    memory: int = torch.cuda.get_device_properties(device).total_memory
    return max(CHUNK, min(GPU_CHUNK, memory // GPU_SHARE // torch.float32.itemsize))


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy that computes the gradient together with the loss, chunk by chunk, and keeps only the gradient."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, drawn: Tensor | None
    ) -> Tensor:
        grad_states, grad_weight = torch.empty_like(states), torch.zeros_like(weight)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        rows = max(1, chunk_of(states.device) // len(weight))
        buffer = states.new_empty((min(rows, len(states)), len(weight)))
        losses = []
        for x, grad, target in zip(states.split(rows), grad_states.split(rows), targets.split(rows), strict=True):
            logits = buffer[: len(x)]
            if bias is None:
                torch.mm(x, weight.t(), out=logits)
            else:
                torch.addmm(bias, x, weight.t(), out=logits)
            right = logits.gather(1, target.unsqueeze(1))
            if drawn is not None:  # each item stands for 1 / probability items, the target for itself
                logits.sub_(drawn).scatter_(1, target.unsqueeze(1), right)
            highest = logits.amax(dim=1)
            powers = logits.sub_(highest.unsqueeze(1)).exp_()  # [rows, items]
            total = powers.sum(dim=1)
            losses.append(total.log() + highest - right.squeeze(1))
            # The gradient of the logits is powers / total, minus 1 at the target; it is never stored as a tensor.
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
        return grad_states * grad, grad_weight * grad, rest[0] * grad if rest else None, None, None


def cross_entropy(
    states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, drawn: Tensor | None = None
) -> Tensor:
    """Return the sum over all predictions of -log softmax(states @ weight.T + bias)[target].

    Loss and gradients equal those of ``torch.nn.functional.cross_entropy(..., reduction="sum")`` up to rounding, with
    the memory use and traffic of one chunk of logits. The gradient cannot be differentiated again.

    Args:
        states: states [predictions, width].
        weight: item vectors [items, width].
        bias: item biases [items], or None.
        targets: item numbers [predictions], as rows of ``weight``.
        drawn: for a sample of the catalogue, the logarithm of each item's probability to be in it [items]. The sum over
            the sample, each item divided by its probability, estimates the sum over the catalogue without bias.
    """
    apply: Callable[..., Tensor] = _CrossEntropy.apply  # torch does not type apply
    return apply(states, weight, bias, targets, drawn)
