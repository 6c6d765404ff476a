"""Batches computed without their padding: packed step by step, or in groups of like lengths."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SHORT = 8
"""Rows up to this length are one group: smaller ones are not worth a pass of their own."""


@dataclass(frozen=True)
class Packing:
    """The places of a left-padded batch that are not padding, first steps first, as in torch's ``PackedSequence``.

    Step t lists the t-th place of every sequence that has one, the longest sequence first: the sequences of a step are
    the first of the step before it.
    """

    rows: Tensor
    """[positions] of the batch."""
    columns: Tensor
    """[positions] of the batch."""
    sizes: list[int]
    """Sequences that reach each step, descending."""
    in_order: Tensor
    """[positions] packed position of each place, row by row."""

    @classmethod
    def of(cls, kept: Tensor) -> "Packing":
        """Packs the places that are True in ``kept`` [batch, length]; in each row they are the last ones."""
        lengths, longest_first = kept.sum(dim=1).sort(descending=True, stable=True)
        steps = torch.arange(int(lengths[0]), device=kept.device)
        reached = steps.unsqueeze(1) < lengths  # [steps, batch]
        step, place = reached.nonzero(as_tuple=True)
        rows = longest_first[place]
        columns = kept.shape[1] - lengths[place] + step
        in_order = torch.argsort(rows * kept.shape[1] + columns)
        return cls(rows, columns, reached.sum(dim=1).tolist(), in_order)

    def pack(self, padded: Tensor) -> Tensor:
        """[batch, length, ...] -> [positions, ...]."""
        return padded[self.rows, self.columns]

    def unpack(self, packed: Tensor) -> Tensor:
        """[positions, ...] -> the same in the order of ``padded[kept]``: row by row."""
        return packed[self.in_order]


def in_groups(states: Callable[[Tensor], Tensor], items: Tensor, kept: Tensor) -> Tensor:
    """States at the places that ``kept`` marks, from a model that pads: rows of like length are computed together.

    Args:
        states: item numbers [rows, length] -> states [rows, length, width].
        items: item numbers [batch, length], left-padded.
        kept: [batch, length]; in each row the last places.

    Returns:
        [kept, width], in the order of ``padded[kept]``: row by row.
    """
    lengths, shortest_first = kept.sum(dim=1).sort(stable=True)
    # A group ends where its longest row would be more than half again as long as its shortest.
    found, order, start = [], [], 0
    while start < len(lengths):
        longest = max(int(lengths[start]) * 3 // 2, SHORT)
        end = start + int((lengths[start:] <= longest).sum())
        rows, columns = shortest_first[start:end], slice(-int(lengths[end - 1]), None)
        inside = kept[rows, columns]
        found.append(states(items[rows, columns])[inside])
        order.append(rows.unsqueeze(1).expand_as(inside)[inside])
        start = end
    return torch.cat(found)[torch.cat(order).argsort(stable=True)]


class PaddedModel(nn.Module):
    """An architecture that computes its padding too: what follows from its ``forward`` and ``head``.

    See :class:`models.retriever.architectures.retriever.Retriever`.
    """

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Vectors [items + 1, width] and biases [items + 1], if any, of the items: each architecture has its own."""
        raise NotImplementedError

    def last_state(self, items: Tensor) -> Tensor:
        """Left-padded item numbers [batch, length] -> the last states [batch, width]."""
        states: Tensor = self(items)
        return states[:, -1]

    def states_at(self, items: Tensor, kept: Tensor) -> Tensor:
        """States [kept, width] at the places that ``kept`` marks."""
        return in_groups(self, items, kept)

    def score(self, states: Tensor) -> Tensor:
        """States [..., width] -> logits of every item number, the padding's included [..., items + 1]."""
        return F.linear(states, *self.head())
