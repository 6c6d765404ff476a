"""Packing and grouping: the places without padding, in order, for any lengths."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.retriever.architectures.packing import Packing, in_groups

LENGTH = 30
batches = st.lists(st.integers(1, LENGTH), min_size=1, max_size=12)


def left_padded(lengths):
    """Return which places are kept, and items [batch, LENGTH] that are all different."""
    kept = torch.arange(LENGTH) >= LENGTH - torch.tensor(lengths).unsqueeze(1)
    return kept, torch.arange(1, kept.numel() + 1).view(kept.shape) * kept


def test_packing_by_hand():
    """Rows of 1, 3 and 2 places are packed longest first at every step; each step has fewer rows."""
    kept = torch.tensor([[0, 0, 1], [1, 1, 1], [0, 1, 1]], dtype=torch.bool)
    packing = Packing.of(kept)
    assert packing.sizes == [3, 2, 1]
    assert packing.rows.tolist() == [1, 2, 0, 1, 2, 1]
    assert packing.columns.tolist() == [0, 1, 2, 1, 2, 2]


@given(batches)
def test_unpacking_gives_the_places_row_by_row(lengths):
    """The reference is torch's own boolean indexing."""
    kept, items = left_padded(lengths)
    packing = Packing.of(kept)
    assert torch.equal(packing.unpack(packing.pack(items)), items[kept])
    assert sum(packing.sizes) == sum(lengths)


@settings(max_examples=50)
@given(batches)
def test_groups_give_every_place_its_own_state(lengths):
    """A model that returns its input must give the kept places in order.

    No row is computed twice, or with fewer places than its length.
    """
    kept, items = left_padded(lengths)
    shapes = []

    def states(some):
        shapes.append(some.shape)
        return some.unsqueeze(-1)

    assert torch.equal(in_groups(states, items, kept).squeeze(-1), items[kept])
    assert sum(rows for rows, _ in shapes) == len(lengths)
    # At most half of a group is padding, apart from short rows.
    assert sum(rows * max(length - 8, 0) for rows, length in shapes) <= 2 * sum(lengths)
