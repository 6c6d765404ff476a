"""Computes batches without their padding: packed step by step, or in groups of similar lengths."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.device import sent

SHORT = 8
"""Rows up to this length form one group, because shorter rows are not worth a pass of their own."""


@dataclass(frozen=True)
class Packing:
    """The positions of a left-padded batch that are not padding, ordered by step as in torch's ``PackedSequence``.

    Step t lists the t-th position of every sequence that is long enough, longest sequence first, so that the sequences
    of a step are the first ones of the step before it.

    It is computed on the processor, so that a step of the training never waits for a GPU.
    """

    rows: Tensor
    """Row in the batch of each packed position [positions]."""
    columns: Tensor
    """Column in the batch of each packed position [positions]."""
    sizes: list[int]
    """Number of sequences in each step, descending."""
    in_order: Tensor
    """Packed positions [positions] in the order of the batch, row by row."""

    @classmethod
    def of(cls, kept: Tensor) -> "Packing":
        """Return the packing of the positions that are True in ``kept`` [batch, length], in each row the last ones."""
        lengths, longest_first = kept.sum(dim=1).sort(descending=True, stable=True)
        steps = torch.arange(int(lengths[0]), device=kept.device)
        reached = steps.unsqueeze(1) < lengths  # [steps, batch]
        step, place = reached.nonzero(as_tuple=True)
        rows = longest_first[place]
        columns = kept.shape[1] - lengths[place] + step
        in_order = torch.argsort(rows * kept.shape[1] + columns)
        return cls(rows, columns, reached.sum(dim=1).tolist(), in_order)

    def pack(self, padded: Tensor) -> Tensor:
        """Map [batch, length, ...] to [positions, ...]."""
        return padded[self.rows, self.columns]

    def unpack(self, packed: Tensor) -> Tensor:
        """Return packed values [positions, ...] in the order of ``padded[kept]``, that is row by row."""
        return packed[sent(self.in_order, packed.device)]


def in_groups(
    states: Callable[[Tensor], Tensor], items: Tensor, kept: Tensor, device: torch.device | str = "cpu"
) -> Tensor:
    """Return a padding model's states at the positions that ``kept`` marks; similar row lengths are computed together.

    Args:
        states: function that maps item numbers [rows, length] to states [rows, length, width].
        items: item numbers [batch, length], left-padded, on the processor.
        kept: mask [batch, length] of the positions, on the processor; in each row it marks the last ones.
        device: device of the model.

    Returns:
        the states [kept, width] in the order of ``padded[kept]``, that is row by row.
    """
    lengths, shortest_first = kept.sum(dim=1).sort(stable=True)
    # A group ends where its longest row would exceed 1.5 times the length of its shortest.
    found, order, start = [], [], 0
    while start < len(lengths):
        longest = max(int(lengths[start]) * 3 // 2, SHORT)
        end = start + int((lengths[start:] <= longest).sum())
        rows, columns = shortest_first[start:end], slice(-int(lengths[end - 1]), None)
        inside = kept[rows, columns]
        padded = states(sent(items[rows, columns], device))
        found.append(padded.flatten(0, 1)[sent(inside.flatten().nonzero().squeeze(1), device)])
        order.append(rows.unsqueeze(1).expand_as(inside)[inside])
        start = end
    return torch.cat(found)[sent(torch.cat(order).argsort(stable=True), device)]


class PaddedModel(nn.Module):
    """Base class of architectures that compute their padding too and define only ``forward`` and ``head``.

    See :class:`models.retriever.architectures.retriever.Retriever`.
    """

    def head(self, items: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the items' vectors [n, width] and biases [n]; defined by each architecture."""
        raise NotImplementedError

    def last_state(self, items: Tensor) -> Tensor:
        """Map left-padded item numbers [batch, length] to the last states [batch, width]."""
        states: Tensor = self(items)
        return states[:, -1]

    def states_at(self, items: Tensor, kept: Tensor) -> Tensor:
        """Return the states [kept, width] at the positions that ``kept`` marks."""
        return in_groups(self, items, kept, next(self.parameters()).device)

    def score(self, states: Tensor) -> Tensor:
        """Map states [..., width] to the logits of every item number, including the padding's [..., items + 1]."""
        return F.linear(states, *self.head())
