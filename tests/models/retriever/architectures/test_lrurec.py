"""LRURec: the recurrence against its equations, and the training step against the authors' computation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.authors_lrurec import authors_logits, authors_loss
from benchmarks.retriever_step import mean_loss
from models.retriever.architectures.lrurec import LinearRecurrence, LRURec, _DoublingScan, _Scan, scan_of
from models.retriever.architectures.packing import Packing
from models.retriever.batches import inputs_and_targets


def test_recurrence_equals_the_complex_equations_step_by_step():
    """The layer computes h_t = lambda h_(t-1) + gamma (B x_t + b), y_t = Re(C h_t + c).

    The reference uses numpy's complex numbers, one step at a time.
    """
    torch.manual_seed(1)
    layer = LinearRecurrence(width=4, state=3).double()
    x = torch.randn(2, 11, 4, dtype=torch.float64)
    with torch.no_grad():
        computed = layer(x, torch.ones(2, 11, 1, dtype=torch.float64)).numpy()
        decay = np.exp(-np.exp(layer.decay_log.numpy()) + 1j * np.exp(layer.phase_log.numpy()))
        scale = np.exp(layer.scale_log.numpy())
        weight, bias = layer.project_in.weight.numpy(), layer.project_in.bias.numpy()
        into, into_bias = weight[:3] + 1j * weight[3:], bias[:3] + 1j * bias[3:]
        out, out_bias = layer.project_out.weight.numpy(), layer.project_out.bias.numpy()
        out = out[:, :3] - 1j * out[:, 3:]
        for row in range(2):
            state = np.zeros(3, complex)
            for t in range(11):
                state = decay * state + scale * (into @ x[row, t].numpy() + into_bias)
                np.testing.assert_allclose(computed[row, t], (out @ state).real + out_bias, atol=1e-12)


def test_initial_decay_lies_in_the_ring():
    """|lambda|^2 is uniform in [0.8^2, 0.99^2], so |lambda| starts in [0.8, 0.99]; gamma = sqrt(1 - |lambda|^2)."""
    layer = LinearRecurrence(width=4, state=500)
    with torch.no_grad():
        modulus = torch.exp(-torch.exp(layer.decay_log))
        assert modulus.min().item() == pytest.approx(0.8, abs=0.01)
        assert modulus.max().item() == pytest.approx(0.99, abs=0.01)
        torch.testing.assert_close(torch.exp(layer.scale_log), torch.sqrt(1 - modulus**2))


@pytest.fixture
def model():
    torch.manual_seed(7)
    return LRURec(50, width=16).eval()


def short_and_long():
    """Return windows of 1 to 13 items in 13 places; one of them has the same item twice."""
    rng = np.random.default_rng(0)
    windows = [rng.integers(1, 51, count).astype(np.int32) for count in (1, 2, 5, 9, 13)]
    return map(torch.from_numpy, inputs_and_targets([*windows, np.array([4, 4], np.int32)], 13))


def test_logits_equal_the_authors_complex_arithmetic(model):
    """The reference is the authors' scan by doubling blocks in complex numbers, at every position with a target."""
    inputs, targets = short_and_long()
    with torch.no_grad():
        torch.testing.assert_close(
            model.score(model(inputs))[targets > 0], authors_logits(model, inputs)[targets > 0], atol=1e-5, rtol=0
        )


def test_loss_and_gradients_equal_the_authors(model):
    """The loss agrees to 1e-5 and the gradients agree too, although padded positions are never computed."""
    inputs, targets = short_and_long()
    results = []
    for loss in (authors_loss, mean_loss):
        model.zero_grad()
        value = loss(model, inputs, targets)
        value.backward()
        results.append((value.item(), {name: value.grad.clone() for name, value in model.named_parameters()}))
    (expected, gradients), (ours, our_gradients) = results
    assert ours == pytest.approx(expected, abs=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("scan", [_Scan, pytest.param(_DoublingScan, marks=pytest.mark.thorough)])
@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_the_packed_scan_has_the_gradient_of_its_recurrence(scan, lengths, seed):
    """The reference is torch's numerical differentiation of both drive and decay, in double precision."""
    torch.manual_seed(seed)
    kept = torch.arange(9) >= 9 - torch.tensor(lengths).unsqueeze(1)
    drive = torch.randn(sum(lengths), 2, dtype=torch.complex128, requires_grad=True)
    decay = torch.polar(torch.tensor([0.9, 0.5], dtype=torch.float64), torch.tensor([0.3, 2.0], dtype=torch.float64))
    assert torch.autograd.gradcheck(scan.apply, (drive, decay.requires_grad_(), Packing.of(kept).sizes))


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=9), seed=st.integers(0, 99))
def test_the_scan_of_a_gpu_is_that_of_a_processor(lengths, seed):
    """States and both gradients of the rounds are those of the steps, in fp32; the first step has all sequences."""
    torch.manual_seed(seed)
    kept = torch.arange(70) >= 70 - torch.tensor(lengths).unsqueeze(1)
    sizes = Packing.of(kept).sizes
    drive = torch.randn(sum(lengths), 8, dtype=torch.complex64)
    decay = torch.polar(torch.rand(8) * 0.19 + 0.8, torch.rand(8) * 6)
    weight, found = torch.randn_like(drive), []
    for scan in (_Scan, _DoublingScan):
        inputs = drive.clone().requires_grad_(), decay.clone().requires_grad_()
        states = scan.apply(*inputs, sizes)
        found.append((states.detach(), *torch.autograd.grad((states * weight).real.sum(), inputs)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_each_device_has_its_scan():
    assert scan_of(torch.device("cpu")) == _Scan.apply
    assert scan_of(torch.device("cuda")) == _DoublingScan.apply
