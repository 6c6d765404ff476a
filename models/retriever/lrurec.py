"""LRURec: sequential recommendation with linear recurrent units, in real arithmetic.

Source: Yue et al., "Linear Recurrent Units for Sequential Recommendation" (WSDM 2024); the recurrence is that of
Orvieto et al. 2023. Every complex number is kept as two reals, so that the module that is trained is the module that
ONNX can express.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LinearRecurrence(nn.Module):
    """Diagonal complex recurrence h_t = lambda * h_(t-1) + gamma * (B x_t + b), y_t = Re(C h_t + c).

    Source: Orvieto et al. 2023, equations 5-7, with the ring initialisation of their section 3.3; as used by LRURec
    (Yue et al. 2024, section 3.2), where gamma scales the bias too and is learned apart.

    Args:
        width: size of the input and output vectors.
        state: number of complex states, each kept as two reals.
        radius: smallest and largest |lambda| at the start.
    """

    def __init__(self, width: int, state: int, radius: tuple[float, float] = (0.8, 0.99)) -> None:
        super().__init__()
        smallest, largest = radius
        square = torch.rand(state) * (largest**2 - smallest**2) + smallest**2
        self.decay_log = nn.Parameter(torch.log(-0.5 * torch.log(square)))
        self.phase_log = nn.Parameter(torch.log(2 * math.pi * torch.rand(state)))
        self.scale_log = nn.Parameter(0.5 * torch.log(1 - square))
        self.project_in = nn.Linear(width, 2 * state)
        self.project_out = nn.Linear(2 * state, width)

    def forward(self, x: Tensor, is_item: Tensor) -> Tensor:
        """Runs the recurrence over a batch of left-padded sequences.

        Args:
            x: [batch, length, width].
            is_item: [batch, length, 1], 1.0 at items and 0.0 at the padding, whose drive is cut so that it never leaks.

        Returns:
            [batch, length, width].
        """
        scale = torch.exp(self.scale_log).repeat(2)
        real, imaginary = (self.project_in(x) * scale * is_item).chunk(2, dim=-1)  # each [batch, length, state]
        modulus, phase = torch.exp(-torch.exp(self.decay_log)), torch.exp(self.phase_log)
        power_real, power_imaginary = modulus * torch.cos(phase), modulus * torch.sin(phase)
        # Recursive doubling: after the step of reach s, h_t holds the last 2 s drives.
        reach = 1
        while reach < x.shape[1]:
            before_real = F.pad(real[:, :-reach], (0, 0, reach, 0))
            before_imaginary = F.pad(imaginary[:, :-reach], (0, 0, reach, 0))
            real, imaginary = (
                real + power_real * before_real - power_imaginary * before_imaginary,
                imaginary + power_real * before_imaginary + power_imaginary * before_real,
            )
            power_real, power_imaginary = power_real**2 - power_imaginary**2, 2 * power_real * power_imaginary
            reach *= 2
        output: Tensor = self.project_out(torch.cat((real, imaginary), dim=-1))
        return output


class LRUBlock(nn.Module):
    """Recurrence and feed-forward layer, each with dropout, an identity residual and a LayerNorm after it."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.recurrence = LinearRecurrence(width, 2 * width)
        self.recurrence_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.feed_forward_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, is_item: Tensor) -> Tensor:
        """X [batch, length, width] -> [batch, length, width]."""
        x = self.recurrence_norm(x + self.dropout(self.recurrence(x, is_item)))
        output: Tensor = self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))
        return output


class LRURec(nn.Module):
    """Scores every item as the next one of a sequence.

    Args:
        items: size of the catalogue; item numbers are 1..items and 0 is the padding.
        width: size of the item embeddings.
        blocks: number of LRU blocks.
        dropout: share of activations dropped in training.
    """

    def __init__(self, items: int, width: int = 64, blocks: int = 2, dropout: float = 0.2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(items + 1, width, padding_idx=0)
        self.embedding_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(LRUBlock(width, dropout) for _ in range(blocks))
        self.bias = nn.Parameter(torch.zeros(items + 1))
        for name, parameter in self.named_parameters():
            if not name.endswith("_log") and "norm" not in name:
                nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)

    def forward(self, items: Tensor) -> Tensor:
        """Left-padded item numbers [batch, length] -> states [batch, length, width]."""
        is_item = (items > 0).unsqueeze(-1).to(self.bias.dtype)  # [batch, length, 1]
        x: Tensor = self.embedding_norm(self.dropout(self.embedding(items)))
        for block in self.blocks:
            x = block(x, is_item)
        return x

    def score(self, states: Tensor) -> Tensor:
        """States [..., width] -> logits of every item number, the padding's included [..., items + 1]."""
        logits: Tensor = F.linear(states, self.embedding.weight, self.bias)
        return logits
