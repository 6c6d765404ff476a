"""Dropout: its share, its mean, and that evaluation changes nothing."""

import pytest
import torch

from models.retriever.architectures.dropout import Dropout


@pytest.mark.parametrize("share", [0.1, 0.5, 0.6])
def test_share_and_scale(share):
    """A share of a million ones is dropped, within five standard errors; the others become 1 / (1 - share).

    The gradients are the same.
    """
    torch.manual_seed(0)
    x = torch.ones(1000, 1000, requires_grad=True)
    y = Dropout(share).train()(x)
    dropped = (y == 0).float().mean().item()
    assert dropped == pytest.approx(share, abs=5 * (share * (1 - share) / 1e6) ** 0.5)
    assert y[y > 0].unique().tolist() == pytest.approx([1 / (1 - share)], rel=1e-4)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_every_row_and_column_is_hit_alike():
    """Every place is equally likely: the largest of 200 column means stays within five standard errors."""
    torch.manual_seed(1)
    means = (Dropout(0.3).train()(torch.ones(20_000, 200)) == 0).float().mean(dim=0)
    assert (means - 0.3).abs().max() < 5 * (0.3 * 0.7 / 20_000) ** 0.5


def test_evaluation_and_nothing_to_drop_change_nothing():
    x = torch.randn(3, 5)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0).train()(x) is x
