"""The items' vectors with and without titles, alone and in every architecture."""

import importlib
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from models.retriever.architectures.build import MODELS, build_model
from models.retriever.architectures.item_embedding import ItemEmbedding
from models.retriever.batches import inputs_and_targets
from models.retriever.fitting.loop import make_optimizer
from models.retriever.fitting.objectives import binary_loss, cloze_loss, next_item_loss
from models.retriever.options import RetrieverTraining

ITEMS, WIDTH, DIMENSIONS = 12, 8, 5
OPTIONS = {
    name: RetrieverTraining(model=name, width=WIDTH, blocks=1, heads=2, max_length=6, titles="words") for name in MODELS
}


def titles(items: int = ITEMS) -> torch.Tensor:
    """Return random unit vectors [items + 1, dimensions] with zeros for the padding."""
    vectors = torch.randn(items + 1, DIMENSIONS, generator=torch.Generator().manual_seed(0))
    vectors[0] = 0
    return nn.functional.normalize(vectors, dim=1)


@pytest.fixture
def embedding() -> ItemEmbedding:
    torch.manual_seed(0)
    return ItemEmbedding(ITEMS + 1, WIDTH, titles())


@pytest.mark.parametrize("vectors", [None, titles()], ids=["without titles", "with titles"])
def test_the_table_holds_every_items_vector(vectors):
    """Row i of the table is the vector of item i, which both the input and the head of a model use."""
    embedding = ItemEmbedding(ITEMS + 1, WIDTH, vectors)
    torch.testing.assert_close(embedding.table(), embedding(torch.arange(ITEMS + 1)))
    torch.testing.assert_close(embedding(torch.tensor([[3, 1], [0, 3]]))[1, 1], embedding.table()[3])


def test_a_vector_is_the_items_own_and_its_titles_projection(embedding):
    """The reference is a matrix product in NumPy."""
    own, weight = embedding.weight.detach().numpy(), embedding.projection.weight.detach().numpy()
    np.testing.assert_allclose(embedding.table().detach().numpy(), own + titles().numpy() @ weight.T, atol=1e-6)


def test_rows_without_a_title_have_their_own_vector_alone():
    """The padding, whose title vector is 0, and BERT4Rec's mask, which comes after the last title."""
    embedding = ItemEmbedding(ITEMS + 2, WIDTH, titles())
    for row in (0, ITEMS + 1):
        assert torch.equal(embedding.table()[row], embedding.weight[row])
        assert torch.equal(embedding(torch.tensor(row)), embedding.weight[row])
    assert not torch.equal(embedding.table()[ITEMS], embedding.weight[ITEMS])


def test_without_titles_it_is_torchs_embedding():
    """The same draws under the same seed, and the same parameters, vectors, gradients and names of the state.

    Models without titles therefore train as before titles could be added.
    """
    torch.manual_seed(5)
    plain, after_plain = nn.Embedding(ITEMS + 1, WIDTH, padding_idx=0), torch.rand(3)
    torch.manual_seed(5)
    ours, after_ours = ItemEmbedding(ITEMS + 1, WIDTH), torch.rand(3)
    assert torch.equal(after_plain, after_ours)
    assert list(ours.state_dict()) == list(plain.state_dict()) == ["weight"]
    assert torch.equal(ours.table(), plain.weight)
    items = torch.tensor([[0, 3, 3, 7]])
    for embedding in (plain, ours):
        embedding(items).square().sum().backward()
    assert torch.equal(ours(items), plain(items))
    assert torch.equal(ours.weight.grad, plain.weight.grad)
    assert not ours.weight.grad[0].any()


class PlainEmbedding(nn.Embedding):
    """The embedding of the architectures before titles could be added."""

    def __init__(self, rows, width, _):
        super().__init__(rows, width, padding_idx=0)

    def table(self):
        return self.weight


@pytest.mark.parametrize("name", MODELS)
def test_an_architecture_without_titles_starts_as_before(name, monkeypatch):
    """With torch's embedding in its place, the same seed gives the same weights and states, to the last bit."""
    torch.manual_seed(3)
    ours = build_model(OPTIONS[name], ITEMS).eval()
    monkeypatch.setattr(
        importlib.import_module(f"models.retriever.architectures.{name}"), "ItemEmbedding", PlainEmbedding
    )
    torch.manual_seed(3)
    plain = build_model(OPTIONS[name], ITEMS).eval()
    state, expected = ours.state_dict(), plain.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    items = torch.tensor([[0, 4, 2, 9]])
    assert torch.equal(ours.score(ours(items)), plain.score(plain(items)))


def test_gradients_reach_the_projection_and_not_the_titles(embedding):
    """The title vectors are an input of the training: no parameter, no gradient, and not part of a stored state."""
    embedding.table().square().sum().backward()
    assert embedding.projection.weight.grad.abs().sum() > 0
    assert embedding.weight.grad.abs().sum() > 0
    assert not embedding.titles.requires_grad
    assert embedding.titles.grad is None
    assert [name for name, _ in embedding.named_parameters()] == ["weight", "projection.weight"]
    assert list(embedding.state_dict()) == ["weight", "projection.weight"]


def test_a_projection_of_wide_titles_starts_small(embedding):
    """Its weights are drawn as the other weights of the architectures: between -0.04 and 0.04."""
    assert 0 < embedding.projection.weight.abs().max() <= 0.04


@pytest.mark.parametrize("name", MODELS)
def test_an_architecture_uses_the_sum_at_both_ends(name):
    """The head has the sums of the items' and the titles' vectors, and the states depend on the history's titles.

    The last row of BERT4Rec's table, its mask, is not part of the head.
    """
    torch.manual_seed(3)
    model = build_model(OPTIONS[name], ITEMS, titles()).eval()
    vectors, _ = model.head()
    assert vectors.shape == (ITEMS + 1, WIDTH)
    torch.testing.assert_close(vectors, model.embedding(torch.arange(ITEMS + 1)))
    some = torch.tensor([5, 0, 2])
    for whole, part in zip(model.head(), model.head(some), strict=True):
        assert (part is None) == (whole is None)
        if part is not None:
            torch.testing.assert_close(part, whole[some])
    states = torch.randn(2, WIDTH)
    torch.testing.assert_close(model.score(states), nn.functional.linear(states, *model.head()))
    items = torch.tensor([[0, 4, 2, 9]])
    before = model.last_state(items)
    with torch.no_grad():
        model.embedding.projection.weight.zero_()
    assert not torch.allclose(before, model.last_state(items), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("lrurec", next_item_loss),
        ("sasrec", next_item_loss),
        ("sasrec", binary_loss),
        ("bert4rec", partial(cloze_loss, masked_share=0.5)),
        ("narm", next_item_loss),
    ],
)
def test_a_step_of_training_changes_the_projection(name, loss):
    """With each architecture's losses: the loss is finite, and the projection and the items' vectors learn from it.

    The title vectors stay what they were.
    """
    torch.manual_seed(3)
    options = OPTIONS[name]
    model = build_model(options, ITEMS, titles())
    optimizer = make_optimizer(model, options)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rng = np.random.default_rng(0)
    windows = [rng.integers(1, ITEMS + 1, length).astype(np.int32) for length in (2, 4, 6)]
    inputs, targets = map(torch.from_numpy, inputs_and_targets(windows, options.max_length))
    total, count = loss(model, inputs, targets)
    assert torch.isfinite(total)
    assert count > 0
    (total / count).backward()
    optimizer.step()
    after = model.state_dict()
    for key in ("embedding.weight", "embedding.projection.weight"):
        assert not torch.equal(after[key], before[key])
    assert torch.equal(model.embedding.titles[: ITEMS + 1], titles())


def test_titles_are_moved_with_the_model(embedding):
    """They are a buffer: a model that is moved to another device or another precision takes them along."""
    moved = embedding.to(torch.float64)
    assert moved.titles.dtype == torch.float64
    assert moved.table().dtype == torch.float64
