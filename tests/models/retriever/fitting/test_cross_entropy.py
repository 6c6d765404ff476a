"""The chunked cross-entropy, compared with torch's."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from models.retriever.fitting import cross_entropy as module
from models.retriever.fitting.cross_entropy import cross_entropy


@settings(max_examples=40, deadline=None)
@given(
    predictions=st.integers(1, 40),
    items=st.integers(2, 50),
    scale=st.sampled_from([0.1, 1.0, 100.0]),
    with_bias=st.booleans(),
    chunk=st.sampled_from([1, 100, 1 << 20]),
    seed=st.integers(0, 99),
)
def test_loss_and_gradients_equal_torchs(predictions, items, scale, with_bias, chunk, seed):
    """The reference is torch's own loss in double precision.

    Sizes vary, logits reach the hundreds, and a chunk has one row, some rows, or all of them.
    """
    torch.manual_seed(seed)
    states = (scale * torch.randn(predictions, 4, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(items, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(items, dtype=torch.float64, requires_grad=True) if with_bias else None
    targets = torch.randint(items, (predictions,))
    parameters = [states, weight, *([bias] if with_bias else [])]
    expected = F.cross_entropy(F.linear(states, weight, bias), targets, reduction="sum") / 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        found = cross_entropy(states, weight, bias, targets) / 3
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("memory", "chunk"), [(80 << 30, 1 << 28), (8 << 30, 1 << 27), (1 << 20, 1 << 20)])
def test_a_gpu_computes_more_logits_at_once(monkeypatch: pytest.MonkeyPatch, memory: int, chunk: int):
    """A sixteenth of 8 GiB are 2^27 logits of four bytes; more than 1 GiB they never take, nor less than 4 MiB."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
    assert module.chunk_of(torch.device("cuda:0")) == chunk
    assert module.chunk_of(torch.device("cpu")) == 1 << 20


def test_a_sample_is_weighed_by_hand():
    """Logits 1 (the target), 2 and 0 of items that are drawn with probability 1/2, 1/4 and 1.

    The denominator is e + 4 e^2 + 1: the target counts once, and the second item stands for four.
    """
    weight = torch.tensor([[1.0], [2.0], [0.0]])
    drawn = torch.tensor([0.5, 0.25, 1.0]).log()
    loss = cross_entropy(torch.ones(1, 1), weight, None, torch.tensor([0]), drawn)
    assert loss.item() == pytest.approx(math.log(math.e + 4 * math.e**2 + 1) - 1, rel=1e-6)
