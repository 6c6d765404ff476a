"""LRURec: sequential recommendation with linear recurrent units, in real arithmetic.

Source: Yue et al., "Linear Recurrent Units for Sequential Recommendation" (WSDM 2024); the recurrence is that of
Orvieto et al. 2023. Every complex number is kept as two reals, so that the trained module can be exported to ONNX as it
is.

Training packs the sequences: every layer but the recurrence works on single positions, so padding is left out, and the
recurrence runs over the packed positions step by step. The exported graph pads and computes the recurrence by recursive
doubling, which needs no loops. Both compute the same function of the same parameters.
"""

import math
from collections.abc import Callable, Iterator
from itertools import accumulate, count, pairwise, takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.device import sent
from models.retriever.architectures.dropout import Dropout
from models.retriever.architectures.item_embedding import ItemEmbedding
from models.retriever.architectures.packing import Packing


class _Scan(torch.autograd.Function):
    """The scan h_t = decay * h_(t-1) + drive_t over packed sequences, step by step.

    Forward and backward each take one pass over memory, and only h is saved between them.
    """

    @staticmethod
    def forward(ctx: Any, drive: Tensor, decay: Tensor, sizes: list[int]) -> Tensor:
        """Map complex drive [positions, state] and decay [state] to h [positions, state]; see :class:`Packing`."""
        states = drive.clone()
        for before, now in pairwise(states.split(sizes)):
            now.addcmul_(decay, before[: len(now)])
        ctx.save_for_backward(states, decay)
        ctx.sizes = sizes
        return states

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]  # torch declares the arguments open
        """Run the same recurrence from the last step to the first, with the conjugate decay."""
        states, decay = ctx.saved_tensors
        grad, conjugates = grad.clone(), states.conj().resolve_conj()
        back = decay.conj().resolve_conj()
        of_decay = torch.zeros_like(grad[: ctx.sizes[0]])
        steps = list(zip(grad.split(ctx.sizes), conjugates.split(ctx.sizes), strict=True))
        for (now, _), (earlier, state) in pairwise(reversed(steps)):
            of_decay[: len(now)].addcmul_(now, state[: len(now)])
            earlier[: len(now)].addcmul_(back, now)
        return grad, of_decay.sum(dim=0), None


class _DoublingScan(torch.autograd.Function):
    """The same scan in as many rounds as the number of steps has binary digits, each over all positions.

    It reads and writes more than :class:`_Scan`, but on a GPU, where each step would wait for the launch of its own
    small operations, it is the number of operations that counts. After the round with reach s, a state contains its
    last 2 s drives.
    """

    @staticmethod
    def forward(ctx: Any, drive: Tensor, decay: Tensor, sizes: list[int]) -> Tensor:
        """Map complex drive [positions, state] and decay [state] to h [positions, state]; see :class:`Packing`."""
        states, places, power = drive.clone(), _Places(sizes, drive.device), decay
        for reach in _reaches(len(sizes)):
            before = states[places.before(reach)]
            states[places.start(reach) :].addcmul_(power, before)
            power = power * power
        ctx.save_for_backward(states, decay)
        ctx.places, ctx.sizes = places, sizes
        return states

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]  # torch declares the arguments open
        """Run the same rounds from later to earlier positions, with the conjugate decay."""
        states, decay = ctx.saved_tensors
        grad, power, places = grad.clone(), decay.conj().resolve_conj(), ctx.places
        for reach in _reaches(len(ctx.sizes)):
            later = grad[places.start(reach) :] * power
            grad[places.before(reach)] += later  # every position has at most one that follows it by `reach`
            power = power * power
        if len(ctx.sizes) == 1:
            return grad, torch.zeros_like(decay), None
        of_decay = (grad[places.start(1) :] * states[places.before(1)].conj()).sum(dim=0)
        return grad, of_decay, None


def _reaches(steps: int) -> Iterator[int]:
    """Yield the powers of two below a number of steps."""
    return takewhile(lambda reach: reach < steps, (1 << digit for digit in count()))


class _Places:
    """Where packed positions and those before them are; see :class:`Packing`."""

    def __init__(self, sizes: list[int], device: torch.device) -> None:
        self._starts = list(accumulate(sizes, initial=0))
        starts = torch.tensor(self._starts)
        step = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        # Copied without waiting for the device: see models.device.sent.
        self._place, self._step, self._start = (
            sent(tensor, device) for tensor in (torch.arange(len(step)) - starts[step], step, starts)
        )
        self._before: dict[int, Tensor] = {}

    def start(self, reach: int) -> int:
        """Return the first position that has one ``reach`` steps before it; all that follow have one too."""
        return self._starts[reach]

    def before(self, reach: int) -> Tensor:
        """Return the position ``reach`` steps before each position from :meth:`start` on."""
        if reach not in self._before:
            first = self.start(reach)
            self._before[reach] = self._start[self._step[first:] - reach] + self._place[first:]
        return self._before[reach]


def scan_of(device: torch.device) -> Callable[..., Tensor]:
    """Return the scan that suits a device: a function of drive, decay and sizes, see :class:`_Scan`."""
    chosen: Callable[..., Tensor] = (_DoublingScan if device.type == "cuda" else _Scan).apply  # torch does not type it
    return chosen


class LinearRecurrence(nn.Module):
    """Diagonal complex recurrence h_t = lambda * h_(t-1) + gamma * (B x_t + b), y_t = Re(C h_t + c).

    Source: Orvieto et al. 2023, equations 5-7, with the ring initialisation of their section 3.3; as used by LRURec
    (Yue et al. 2024, section 3.2), where gamma also scales the bias and is a parameter of its own.

    Args:
        width: size of the input and output vectors.
        state: number of complex states, each kept as two reals.
        radius: smallest and largest |lambda| at initialisation.
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
        """Run the recurrence over a batch of left-padded sequences.

        Args:
            x: input [batch, length, width].
            is_item: mask [batch, length, 1], 1.0 at items and 0.0 at the padding, whose drive is set to 0 by it.

        Returns:
            the output [batch, length, width].
        """
        real, imaginary = self._drive(x, is_item)
        modulus, phase = torch.exp(-torch.exp(self.decay_log)), torch.exp(self.phase_log)
        power_real, power_imaginary = modulus * torch.cos(phase), modulus * torch.sin(phase)
        # Recursive doubling: after the step with reach s, h_t contains the last 2 s drives.
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

    def last(self, x: Tensor, is_item: Tensor) -> Tensor:
        """Return the output at the last position [batch, width], where h_T = sum over t of lambda^(T - t) u_t.

        The arguments are those of :meth:`forward`.
        """
        real, imaginary = self._drive(x, is_item)
        ago = torch.arange(x.shape[1] - 1, -1, -1, device=x.device, dtype=x.dtype).unsqueeze(-1)  # [length, 1]
        modulus, phase = torch.exp(-torch.exp(self.decay_log) * ago), torch.exp(self.phase_log) * ago
        power_real, power_imaginary = modulus * torch.cos(phase), modulus * torch.sin(phase)  # each [length, state]
        last = (
            (power_real * real - power_imaginary * imaginary).sum(dim=1),
            (power_real * imaginary + power_imaginary * real).sum(dim=1),
        )
        output: Tensor = self.project_out(torch.cat(last, dim=-1))
        return output

    def _drive(self, x: Tensor, is_item: Tensor) -> tuple[Tensor, ...]:
        """Return the real and the imaginary part of the drive, each [batch, length, state]."""
        scale = torch.exp(self.scale_log).repeat(2)
        both: Tensor = self.project_in(x) * scale * is_item
        return both.chunk(2, dim=-1)

    def packed(self, x: Tensor, is_item: Tensor, sizes: list[int]) -> Tensor:
        """Run the recurrence over packed sequences.

        Args:
            x: input [positions, width], in the order of a :class:`Packing`.
            is_item: mask [positions, 1], 1.0 at items and 0.0 at the padding.
            sizes: number of sequences in each step.

        Returns:
            the output [positions, width].
        """
        scale = torch.exp(self.scale_log).repeat(2)
        # Alternate real and imaginary rows, so that the projection can be viewed as complex numbers without a copy.
        into, bias = self.project_in.weight * scale.unsqueeze(-1), self.project_in.bias * scale
        into, bias = (part.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1) for part in (into, bias))
        drive = F.linear(x, into, bias) * is_item  # [positions, 2 * state]
        decay = torch.polar(torch.exp(-torch.exp(self.decay_log)), torch.exp(self.phase_log))
        states = scan_of(x.device)(torch.view_as_complex(drive.unflatten(-1, (-1, 2))), decay, sizes)
        out = self.project_out.weight.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return F.linear(torch.view_as_real(states).flatten(-2), out, self.project_out.bias)


class LRUBlock(nn.Module):
    """A block of recurrence and feed-forward layer, each followed by dropout, an identity residual and a LayerNorm."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.recurrence = LinearRecurrence(width, 2 * width)
        self.recurrence_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.feed_forward_norm = nn.LayerNorm(width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, is_item: Tensor, sizes: list[int] | None = None) -> Tensor:
        """Map x [batch, length, width], or with ``sizes`` packed x [positions, width], to the same shape."""
        recurrent = self.recurrence(x, is_item) if sizes is None else self.recurrence.packed(x, is_item, sizes)
        return self._rest(x, recurrent)

    def last(self, x: Tensor, is_item: Tensor) -> Tensor:
        """Map x [batch, length, width] to the output at the last position [batch, width]."""
        return self._rest(x[:, -1], self.recurrence.last(x, is_item))

    def _rest(self, x: Tensor, recurrent: Tensor) -> Tensor:
        """Apply everything after the recurrence, which treats each position independently."""
        x = self.recurrence_norm(x + self.dropout(recurrent))
        output: Tensor = self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))
        return output


class LRURec(nn.Module):
    """A model that scores every item as the next one of a sequence.

    Args:
        items: size of the catalogue; item numbers are 1..items and 0 is the padding.
        width: size of the item embeddings.
        blocks: number of LRU blocks.
        dropout: share of activations that are dropped in training.
        titles: see :class:`ItemEmbedding`.
    """

    def __init__(
        self, items: int, width: int = 64, blocks: int = 2, dropout: float = 0.2, titles: Tensor | None = None
    ) -> None:
        super().__init__()
        self.embedding = ItemEmbedding(items + 1, width, titles)
        self.embedding_norm = nn.LayerNorm(width)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(LRUBlock(width, dropout) for _ in range(blocks))
        self.bias = nn.Parameter(torch.zeros(items + 1))
        for name, parameter in self.named_parameters():
            if not name.endswith("_log") and "norm" not in name:
                nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)

    def forward(self, items: Tensor) -> Tensor:
        """Map left-padded item numbers [batch, length] to states [batch, length, width]."""
        is_item, x = self._embed(items)
        for block in self.blocks:
            x = block(x, is_item)
        return x

    def last_state(self, items: Tensor) -> Tensor:
        """Map left-padded item numbers [batch, length] to the last states [batch, width]."""
        is_item, x = self._embed(items)
        for block in self.blocks[:-1]:
            x = block(x, is_item)
        final: Any = self.blocks[-1]
        state: Tensor = final.last(x, is_item)
        return state

    def states_at(self, items: Tensor, kept: Tensor) -> Tensor:
        """Return the states [kept, width] at the positions that ``kept`` marks."""
        packing = Packing.of(kept)
        is_item, x = self._embed(sent(packing.pack(items), self.bias.device))
        for block in self.blocks:
            x = block(x, is_item, packing.sizes)
        return packing.unpack(x)

    def _embed(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Map item numbers [...] to the mask of the items [..., 1] and the embeddings [..., width]."""
        is_item = (items > 0).unsqueeze(-1).to(self.bias.dtype)
        return is_item, self.embedding_norm(self.dropout(self.embedding(items)))

    def head(self, items: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the vectors [n, width] and biases [n] of some items, by default of all with the padding first."""
        if items is not None:
            return self.embedding(items), self.bias[items]
        return self.embedding.table(), self.bias

    def score(self, states: Tensor) -> Tensor:
        """Map states [..., width] to the logits of every item number, including the padding's [..., items + 1]."""
        return F.linear(states, *self.head())
