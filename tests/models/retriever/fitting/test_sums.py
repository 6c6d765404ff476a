"""A model that was trained with titles, served as one without: the scores of trained and of untrained items."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.retriever.architectures.build import MODELS, build_model
from models.retriever.fitting.sums import with_sums
from models.retriever.options import RetrieverTraining

TRAINED, ITEMS, DIMENSIONS = 20, 27, 5
OPTIONS = RetrieverTraining(width=8, blocks=2, heads=2, max_length=6, titles="words")
HISTORIES = torch.tensor([[0, 0, 0, 0, 0, 7], [3, 3, 9, 20, 1, 4], [0, 0, 0, 0, 0, 0]])


def title_vectors() -> torch.Tensor:
    """Return random vectors [items + 1, dimensions] of all items' titles, with zeros for the padding."""
    vectors = torch.randn(ITEMS + 1, DIMENSIONS, generator=torch.Generator().manual_seed(1))
    vectors[0] = 0
    return vectors


@pytest.fixture(params=MODELS)
def model(request):
    """Return a model of random weights and biases that is trained with the first 20 items' titles.

    The padding's bias is the lowest of all, so that it shows if it is taken for an item's.
    """
    torch.manual_seed(2)
    model = build_model(replace(OPTIONS, model=request.param), TRAINED, title_vectors()[: TRAINED + 1]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
        if hasattr(model, "bias"):
            model.bias.normal_()
            model.bias[0] = -100
    return model


def options_of(model) -> RetrieverTraining:
    return replace(OPTIONS, model=type(model).__name__.lower())


@torch.no_grad()
def test_trained_items_score_as_in_the_trained_model(model):
    """The served model has one vector per item and no projection, and gives the same logits within 1e-5."""
    served = with_sums(model, options_of(model), TRAINED, title_vectors())
    assert (served.items, served.options) == (ITEMS, options_of(model))
    assert not served.model.training
    assert not [name for name in served.model.state_dict() if "projection" in name]
    expected = model.score(model.last_state(HISTORIES))
    found = served.model.score(served.model.last_state(HISTORIES))
    assert found.shape == (len(HISTORIES), ITEMS + 1)
    torch.testing.assert_close(found[:, 1 : TRAINED + 1], expected[:, 1:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_untrained_items_score_by_their_titles(model):
    """Their logits are the state's product with their titles' projection, and the lowest bias of a trained item.

    The reference is computed in NumPy from the trained model's weights.
    """
    served = with_sums(model, options_of(model), TRAINED, title_vectors()).model
    states = model.last_state(HISTORIES).numpy()
    projected = title_vectors().numpy()[TRAINED + 1 :] @ model.embedding.projection.weight.numpy().T
    lowest = model.bias[1:].min().item() if hasattr(model, "bias") else 0.0
    found = served.score(served.last_state(HISTORIES)).numpy()
    np.testing.assert_allclose(found[:, TRAINED + 1 :], states @ projected.T + lowest, atol=1e-5)


@torch.no_grad()
def test_untrained_items_can_be_in_a_history(model):
    """The state after an item that only has a title is that of a trained model whose item has this vector."""
    served = with_sums(model, options_of(model), TRAINED, title_vectors()).model
    found = served.last_state(torch.tensor([[0, 0, 0, 0, 4, ITEMS]]))
    projected = model.embedding.projection(title_vectors()[ITEMS])
    model.embedding.weight[9] += projected - model.embedding.table()[9]  # item 9 stands in
    torch.testing.assert_close(found, model.last_state(torch.tensor([[0, 0, 0, 0, 4, 9]])), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("model", ["bert4rec"], indirect=True)
def test_the_mask_stays_last(model):
    """BERT4Rec's mask follows the last item, and keeps its own vector."""
    served = with_sums(model, options_of(model), TRAINED, title_vectors()).model
    assert (model.mask, served.mask) == (TRAINED + 1, ITEMS + 1)
    assert len(served.embedding.weight) == ITEMS + 2
    assert torch.equal(served.embedding.weight[-1], model.embedding.weight[-1])


@torch.no_grad()
def test_without_untrained_items_the_catalogue_stays(model):
    """With the trained items' titles alone, the served model has these items and their logits."""
    served = with_sums(model, options_of(model), TRAINED, title_vectors()[: TRAINED + 1])
    assert served.items == TRAINED
    found = served.model.score(served.model.last_state(HISTORIES))
    torch.testing.assert_close(found, model.score(model.last_state(HISTORIES)), atol=1e-5, rtol=0)


def test_a_model_without_titles_is_served_as_it_is():
    """Nothing is added: the same model, in evaluation mode."""
    options = replace(OPTIONS, titles="none")
    model = build_model(options, TRAINED).train()
    served = with_sums(model, options, TRAINED, None)
    assert served.model is model
    assert (served.items, served.options) == (TRAINED, options)
    assert not model.training
