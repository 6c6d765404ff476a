"""Packed prompts: what is computed once, what each token attends to, and that loss and gradients are unchanged."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora.layer import LoraLayer
from tiny import tiny_base

from models.ranker.fitting import packing
from models.ranker.fitting.packing import SHORTEST_SHARED, PackedPrompts, pack
from models.ranker.fitting.qlora import add_adapters, answer_loss, load_base

STEM = list(range(100, 100 + 2 * SHORTEST_SHARED))
POOLS = [[*STEM, 7, 8, 9], [*STEM, 8, 8], [*STEM, *range(200, 240), 5], [*STEM, *range(200, 240), 6, 6], [11, 12]]
ANSWERS = [[49, 2], [50, 2], [51, 2], [49, 2], [52, 2]]


def seen(packed: PackedPrompts) -> dict[int, set[int]]:
    """Return, for each place in the packed sequence, the places that it attends to."""
    result = {}
    for segment in packed.segments:
        context = [
            place for start, end in (*segment.above, (segment.start, segment.end)) for place in range(start, end)
        ]
        size = segment.end - segment.start
        mask = segment.mask
        if mask is None:
            mask = torch.ones(size, size, dtype=torch.bool).tril()
        assert mask.shape == (size, len(context))
        for row in range(size):
            result[segment.start + row] = {context[column] for column in mask[row].nonzero().flatten().tolist()}
    return result


def assert_faithful(prompts: list[list[int]], packed: PackedPrompts) -> None:
    """Assert that each prompt is present at its own positions, and each token attends to its prompt up to itself."""
    attended = seen(packed)
    for prompt, places in zip(prompts, packed.places, strict=True):
        assert packed.tokens[0, places].tolist() == prompt
        assert packed.positions[0, places].tolist() == list(range(len(prompt)))
        for depth, place in enumerate(places):
            assert attended[place] == set(places[: depth + 1].tolist())


@settings(deadline=None)
@given(
    stems=st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=3 * SHORTEST_SHARED), min_size=1, max_size=3),
    tails=st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(1, 3), max_size=20)), min_size=1, max_size=8),
)
def test_every_token_sees_its_prompt_up_to_itself(stems: list[list[int]], tails: list[tuple[int, list[int]]]):
    """Packing is correct whether prompts share prefixes, repeat each other, or have nothing in common."""
    prompts = [[*stems[place % len(stems)], *tail] for place, tail in tails]
    assert_faithful(prompts, pack(prompts))
    assert_faithful(prompts, pack(prompts, share=False))


def test_what_is_shared_is_there_once_and_nothing_is_padded():
    """A stem of 32 tokens with tails of 3 and 2, 40 more shared by two tails of 1 and 2, and 2 alone make 82 tokens."""
    assert pack(POOLS).tokens.shape == (1, 32 + 3 + 2 + 40 + 1 + 2 + 2)
    assert pack(POOLS, share=False).tokens.shape == (1, sum(map(len, POOLS)))


def test_a_short_common_beginning_is_not_worth_a_segment():
    """Two prompts that share only 3 tokens stay apart: there are two segments, and no segment above either."""
    assert [segment.above for segment in pack([[1, 2, 3, 4], [1, 2, 3, 5]]).segments] == [(), ()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
@pytest.mark.parametrize("layers", [None, 1])
@pytest.mark.parametrize("share", [True, False])
def test_loss_and_gradients_are_the_plain_ways(folder: Path, quantisation: str, layers: int | None, share: bool):
    """The reference is transformers' own causal loss, with the adapters computed by peft's own layers.

    It reads one prompt per pass, computes logits at every position and ignores everything but the answer.
    """
    model = load_base(folder, quantisation=quantisation, dtype=torch.float32, device="cpu")
    model = add_adapters(model, rank=4, alpha=16, dropout=0.0, targets=("q_proj", "v_proj", "down_proj"), layers=layers)
    torch.manual_seed(1)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(("layers.1." in name) or layers is None for name in trained)
    for parameter in trained.values():
        torch.nn.init.normal_(parameter, std=0.05)

    def gradients() -> list[np.ndarray]:
        found = [p.grad.numpy().copy() for p in trained.values() if p.grad is not None]
        assert len(found) == len(trained)
        model.zero_grad()
        return found

    layers_of_peft = [module for module in model.modules() if isinstance(module, LoraLayer)]
    variants = [dict(module.lora_variant) for module in layers_of_peft]
    assert all(variants)
    for module in layers_of_peft:
        module.lora_variant.clear()
    plain = 0.0
    for prompt, answer in zip(POOLS, ANSWERS, strict=True):
        labels = torch.tensor([[*[-100] * len(prompt), *answer]])
        loss = model(input_ids=torch.tensor([[*prompt, *answer]]), labels=labels).loss * len(answer)
        loss.backward()
        plain += float(loss.detach())
    expected = gradients()
    for module, variant in zip(layers_of_peft, variants, strict=True):
        module.lora_variant.update(variant)
    loss = answer_loss(model, POOLS, ANSWERS, share=share)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(plain, rel=1e-5)
    for ours, theirs in zip(gradients(), expected, strict=True):
        assert np.abs(theirs).max() > 1e-3
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("block", [16, 128])
def test_bf16_learns_what_fp32_does(folder: Path, share: bool, block: int, monkeypatch: pytest.MonkeyPatch):
    """The same model in fp32 is the reference; bf16 has 8 bits, and the adapters' gradients are returned in fp32.

    Prompts have up to 74 tokens: with blocks of 16 they have several, with and without a segment above them.
    """
    monkeypatch.setattr(packing, "ATTENTION_BLOCK", block)
    losses, gradients = [], []
    for dtype in (torch.float32, torch.bfloat16):
        model = load_base(folder, quantisation="none", dtype=dtype, device="cpu")
        model = add_adapters(model, rank=4, alpha=16, dropout=0.0, targets=("q_proj", "v_proj", "down_proj"))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        torch.manual_seed(1)
        for parameter in trained:
            torch.nn.init.normal_(parameter, std=0.05)
        loss = answer_loss(model, POOLS, ANSWERS, share=share)
        loss.backward()
        losses.append(float(loss.detach()))
        found = [parameter.grad for parameter in trained if parameter.grad is not None]
        assert {gradient.dtype for gradient in found} == {torch.float32}
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert float(torch.cosine_similarity(*gradients, dim=0)) > 0.99
