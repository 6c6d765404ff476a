"""LRURec: the recurrence against its equations, the padding, and the ONNX export against PyTorch."""

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.retriever.batches import pad_left
from models.retriever.lrurec import LinearRecurrence, LRURec
from models.retriever.onnx_export import export_onnx

ITEMS, LENGTH = 50, 13


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(7)
    return LRURec(ITEMS, width=16).eval()


@pytest.fixture(scope="module")
def onnx_session(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "retriever.onnx"
    export_onnx(model, LENGTH, path)
    return onnxruntime.InferenceSession(path)


def test_recurrence_equals_the_complex_equations_step_by_step():
    """h_t = lambda h_(t-1) + gamma (B x_t + b), y_t = Re(C h_t + c): numpy's complex numbers, one step at a time."""
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


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, ITEMS), min_size=1, max_size=LENGTH), st.integers(1, 20))
def test_padding_never_changes_the_scores(model, history, more):
    """The same history behind more pads: the drive of a pad is cut, so the last state is the same."""
    history = np.array(history)
    with torch.no_grad():
        short, long = (
            model.score(model(torch.from_numpy(pad_left([history], length)))[:, -1])
            for length in (len(history), len(history) + more)
        )
    torch.testing.assert_close(short, long, atol=1e-5, rtol=0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(1, ITEMS), max_size=2 * LENGTH), min_size=1, max_size=9))
def test_onnx_equals_pytorch(model, onnx_session, histories):
    """Any batch size, any history, the empty one too: the exported graph gives PyTorch's logits within 1e-4."""
    items = pad_left([np.array(history, np.int32) for history in histories], LENGTH)
    with torch.no_grad():
        expected = model.score(model(torch.from_numpy(items))[:, -1]).numpy()
    np.testing.assert_allclose(onnx_session.run(None, {"items": items})[0], expected, atol=1e-4, rtol=0)
