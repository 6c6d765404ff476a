"""What every retriever must keep: padding changes nothing, the future is unseen, ONNX equals PyTorch."""

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.retriever.batches import pad_left
from models.retriever.onnx_export import export_onnx
from models.retriever.fitting import MODELS, build_model
from models.retriever.options import RetrieverTraining

ITEMS, LENGTH = 50, 13
OPTIONS = {name: RetrieverTraining(model=name, width=16, blocks=2, heads=2, max_length=LENGTH) for name in MODELS}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    torch.manual_seed(7)
    model = build_model(OPTIONS[request.param], ITEMS).eval()
    with torch.no_grad():  # larger than at the start of a training, so that differences show
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


@pytest.fixture(scope="module")
def onnx_session(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "retriever.onnx"
    export_onnx(model, LENGTH, path)
    return onnxruntime.InferenceSession(path)


def scores(model, histories, length):
    with torch.no_grad():
        return model.score(model(torch.from_numpy(pad_left(histories, length)))[:, -1])


histories = st.lists(st.integers(1, ITEMS), min_size=1, max_size=LENGTH)


@settings(max_examples=30, deadline=None)
@given(histories)
def test_padding_never_changes_the_scores(model, history):
    """As little padding as can be, and as much: the same logits. BERT4Rec's mask needs a place too."""
    history = np.array(history[: LENGTH - 1])
    short = scores(model, [history], len(history) + 1)
    torch.testing.assert_close(short, scores(model, [history], LENGTH), atol=1e-4, rtol=0)


@settings(max_examples=30, deadline=None)
@given(histories, histories)
def test_scores_do_not_depend_on_the_batch(model, one, other):
    """Alone and beside another history."""
    one, other = np.array(one), np.array(other)
    together = scores(model, [one, other], LENGTH)[0]
    torch.testing.assert_close(together, scores(model, [one], LENGTH)[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("model", [name for name in MODELS if name != "bert4rec"], indirect=True)
@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, ITEMS), min_size=LENGTH, max_size=LENGTH), st.integers(1, LENGTH - 1), st.integers(1, ITEMS)
)
def test_the_future_is_unseen(model, history, place, item):
    """Another item at a place changes no state before it; BERT4Rec alone reads both ways."""
    items = torch.tensor([history, [*history[:place], item, *history[place + 1 :]]])
    with torch.no_grad():
        states = model(items)[:, :place]
    torch.testing.assert_close(states[0], states[1], atol=1e-5, rtol=0)


def test_the_order_of_the_history_matters(model):
    """The same items, the last two swapped: other scores."""
    one, other = np.array([3, 9, 4, 7]), np.array([3, 9, 7, 4])
    assert not torch.allclose(scores(model, [one], LENGTH), scores(model, [other], LENGTH), atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(1, ITEMS), max_size=2 * LENGTH), min_size=1, max_size=9))
def test_onnx_equals_pytorch(model, onnx_session, histories):
    """Any batch size, any history, the empty one too: the exported graph gives PyTorch's logits within 1e-4."""
    rows = [np.array(history, np.int32) for history in histories]
    expected = scores(model, rows, LENGTH).numpy()
    found = onnx_session.run(None, {"items": pad_left(rows, LENGTH)})[0]
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
