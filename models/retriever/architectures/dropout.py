"""Dropout whose mask costs 16 random bits an element."""

import torch
from torch import Tensor, nn

LEVELS = 1 << 16


class Dropout(nn.Module):
    """Zeroes a share of the activations in training and scales the rest so that the mean stays.

    As ``torch.nn.Dropout``, whose masks take a sixth of a retriever's step on a processor: it draws a random number of
    53 bits for each element, this one 16. The share is a multiple of 1 / 65536, and the scale is exact for it.

    Args:
        share: of the activations, at least 0 and below 1.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.dropped = round(share * LEVELS)

    def extra_repr(self) -> str:
        """For printing the module."""
        return f"share={self.share}"

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        if not self.training or self.dropped == 0:
            return x
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)  # uniform in [-32768, 32767]
        kept = torch.where(bits >= self.dropped - LEVELS // 2, LEVELS / (LEVELS - self.dropped), 0.0)
        return x * kept.to(x.dtype)
