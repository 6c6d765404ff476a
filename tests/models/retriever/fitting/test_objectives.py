"""The training losses: their values by hand, and the items that they mask."""

import math
from functools import partial

import pytest
import torch

from models.retriever.architectures import lrurec
from models.retriever.architectures.bert4rec import BERT4Rec
from models.retriever.architectures.build import build_model
from models.retriever.architectures.lrurec import _DoublingScan, _Scan
from models.retriever.fitting.objectives import binary_loss, cloze_loss, next_item_loss, sampled_loss
from models.retriever.options import RetrieverTraining


class TwoItems:
    """A model that scores item 1 with 2 and item 2 with -1 for every history."""

    training = True

    def states_at(self, items, kept):
        return torch.ones(int(kept.sum()), 1)

    def head(self):
        return torch.tensor([[0.0], [1.5], [-1.0]]), torch.tensor([0.0, 0.5, 0.0])


def test_binary_loss_by_hand():
    """With two items the negative is certain: target 1 gives log(1 + e^-2) and log(1 + e^-1), target 2 the opposite."""
    right = (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 2
    wrong = (math.log1p(math.exp(2)) + math.log1p(math.exp(1))) / 2
    inputs = torch.tensor([[0, 0], [0, 1]])
    for targets, expected in (([[0, 1], [1, 1]], right), ([[0, 0], [0, 2]], wrong)):
        total, count = binary_loss(TwoItems(), inputs, torch.tensor(targets))
        assert total.item() / count == pytest.approx(expected)


def test_cloze_masks_the_share_it_is_given():
    """In 1,000 full windows of 20 items, .9 x .6 + .1 x 1/20 of the items are masked, within five standard errors."""
    torch.manual_seed(0)
    model = BERT4Rec(items=9, length=20, width=8, heads=2)
    _, count = cloze_loss(model, torch.empty(0), torch.randint(1, 10, (1000, 20)), masked_share=0.6)
    assert count / 20000 == pytest.approx(0.545, abs=0.03)


def test_cloze_masks_items_and_never_the_padding(monkeypatch):
    """Each of 500 windows has at least one masked item, and about a fifth of all items are masked.

    In about a tenth of the windows or more, only the last item is masked.
    """
    torch.manual_seed(0)
    model = BERT4Rec(items=9, length=20, width=8, heads=2)
    seen = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda items: seen.append(items) or encode(items))
    lengths = torch.arange(500) % 20 + 1
    targets = torch.where(torch.arange(20) >= 20 - lengths.unsqueeze(1), torch.randint(1, 10, (500, 20)), 0)
    loss, count = cloze_loss(model, torch.empty(0), targets, masked_share=0.2)
    assert loss.isfinite()
    # Rows come in groups of similar length: padding is cut off, and the end of every row stays.
    assert sum(map(len, seen)) == 500
    masked = [items == model.mask for items in seen]
    assert all(some.any(dim=1).all() for some in masked)
    assert sum(int(some.sum()) for some in masked) == count
    of_targets = torch.cat([items[items > 0] for items in seen]).bincount(minlength=11)
    assert 0.15 < of_targets[model.mask] / (targets > 0).sum() < 0.3
    assert (of_targets[:10] <= targets[targets > 0].bincount(minlength=10)).all()
    full = torch.cat(
        [some[(items > 0).all(dim=1)] for items, some in zip(seen, masked, strict=True) if some.shape[1] == 20]
    )
    assert 0.12 < full.float().mean() < 0.28
    only_last = (full.sum(dim=1) == 1) & full[:, -1]
    assert 0.0 < only_last.float().mean() < 0.5


@pytest.fixture
def skewed():
    """Return a model without dropout, inputs, targets drawn by a skewed popularity, and that popularity."""
    torch.manual_seed(0)
    model = build_model(RetrieverTraining(model="sasrec", dropout=0.0, blocks=1), 300, torch.randn(301, 16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)  # logits that differ
    popularity = torch.rand(301) ** 4
    popularity[0] = 0
    popularity /= popularity.sum()
    targets = torch.multinomial(popularity, 320, replacement=True).reshape(64, 5)
    inputs = targets.roll(1, dims=1)
    inputs[:, 0] = 0
    return model, inputs, targets, popularity


def test_a_sample_of_everything_gives_the_full_softmax(skewed):
    """With as many random items as there are, loss and gradients are those of torch's cross-entropy over all items."""
    model, inputs, targets, popularity = skewed
    logits = model.score(model.states_at(inputs, targets > 0))[:, 1:]
    expected = torch.nn.functional.cross_entropy(logits, targets.flatten() - 1, reduction="sum")
    found, count = sampled_loss(model, inputs, targets, negatives=300, popularity=popularity)
    assert count == 320
    parameters = list(model.parameters())
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_sample_estimates_the_full_softmax(skewed):
    """The mean over 100 samples of a sixth of the items is within 0.05 of the full loss.

    Without the correction it is lower by more than 0.2, because most items are missing from the denominator.
    """
    model, inputs, targets, popularity = skewed
    with torch.no_grad():
        full = next_item_loss(model, inputs, targets)[0] / 320
        samples = [sampled_loss(model, inputs, targets, 50, popularity)[0] / 320 for _ in range(100)]
        assert torch.stack(samples).mean() == pytest.approx(full.item(), abs=0.05)
        shown = torch.unique(torch.cat((targets.flatten(), torch.randperm(301)[:50])))
        logits = model.states_at(inputs, targets > 0) @ model.head(shown)[0].T
        uncorrected = torch.nn.functional.cross_entropy(logits, torch.searchsorted(shown, targets.flatten()))
        assert uncorrected < full - 0.2


@pytest.mark.parametrize("scan", [_Scan, _DoublingScan])
@pytest.mark.parametrize(
    ("model", "learn"),
    [
        ("lrurec", next_item_loss),
        ("lrurec", partial(sampled_loss, negatives=5, popularity=torch.full((10,), 1 / 9))),
        ("sasrec", next_item_loss),
        ("sasrec", binary_loss),
        ("narm", next_item_loss),
        ("bert4rec", partial(cloze_loss, masked_share=0.5)),
    ],
)
def test_a_step_reads_nothing_back_from_its_device(model, learn, scan, monkeypatch):
    """On a GPU each number that is read back waits for all that is being computed. PyTorch's device ``meta`` computes
    nothing, so any operation whose result, or whose size, the processor would have to read raises an error there.
    """
    monkeypatch.setattr(lrurec, "scan_of", lambda device: scan.apply)
    options = RetrieverTraining(model=model, width=8, heads=2 if model == "bert4rec" else 1, max_length=6)
    built = build_model(options, 9, torch.zeros(10, 4)).to("meta").train()
    inputs = torch.tensor([[0, 0, 0, 1, 2, 3], [4, 5, 6, 7, 8, 9], [0, 0, 0, 0, 0, 1]])
    loss, count = learn(built, inputs, torch.roll(inputs, -1, dims=1).where(inputs > 0, 0))
    assert isinstance(count, int)
    torch.autograd.backward(loss)
    assert all(parameter.grad is not None for parameter in built.parameters())
    with pytest.raises(RuntimeError, match="meta"):
        float(loss.detach())
