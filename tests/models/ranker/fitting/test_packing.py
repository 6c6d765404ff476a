"""Packed prompts: what is computed once, what each token attends to, and that loss and gradients are unchanged."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora.layer import LoraLayer
from tiny import tiny_base
from torch import Tensor

from models.ranker.fitting import packing
from models.ranker.fitting.packing import SHORTEST_SHARED, PackedPrompts, pack
from models.ranker.fitting.qlora import add_adapters, answer_loss, line_loss, load_base
from models.ranker.forward.attention import KERNEL, attend_by_sequence
from models.ranker.prompt import Prompt

STEM = list(range(100, 100 + 2 * SHORTEST_SHARED))
POOLS = [[*STEM, 7, 8, 9], [*STEM, 8, 8], [*STEM, *range(200, 240), 5], [*STEM, *range(200, 240), 6, 6], [11, 12]]
ANSWERS = [[49, 2], [50, 2], [51, 2], [49, 2], [52, 2]]
INDEPENDENT = [Prompt.of_lines([*STEM, *range(3)], [[7, 8], [9], [7, 5, 6]]), Prompt.of_lines(STEM, [[9, 9], [4]])]


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


def losses_and_gradients(model: Any, share: bool) -> dict[str, tuple[float, Tensor]]:
    """Return the loss of letters, lines and independent lines, and its gradient over all adapters and the direction."""
    direction = torch.linspace(-1, 1, model.config.hidden_size, device=model.device, requires_grad=True)
    trained = [direction, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    ordered = [Prompt(tokens, [len(tokens) - 2, len(tokens) - 1]) for tokens in POOLS]
    scores = [torch.zeros(len(prompt.line_ends)) for prompt in (*ordered, *INDEPENDENT)]
    found = {}
    for name, loss in {
        "letters": lambda: answer_loss(model, POOLS, ANSWERS, share=share),
        "lines": lambda: line_loss(model, direction, ordered, [0] * 5, scores[:5], share=share),
        "independent": lambda: line_loss(model, direction, INDEPENDENT, [2, 0], scores[5:], share=share),
    }.items():
        value = loss()
        gradients = torch.autograd.grad(value, trained, allow_unused=True)
        given = [torch.zeros_like(t) if g is None else g for t, g in zip(trained, gradients, strict=True)]
        found[name] = float(value.detach()), torch.cat([gradient.flatten().float() for gradient in given])
    return found


def adapted(folder: Path, dtype: torch.dtype, device: str) -> Any:
    """Return a base with adapters that are not zero."""
    model = load_base(folder, quantisation="none", dtype=dtype, device=device)
    model = add_adapters(model, rank=4, alpha=16, dropout=0.0, targets=("q_proj", "k_proj", "v_proj", "down_proj"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


@pytest.mark.parametrize("share", [True, False])
def test_attention_of_all_segments_at_once_learns_the_same(folder: Path, share: bool, monkeypatch: pytest.MonkeyPatch):
    """On a GPU one operation computes the attention of all segments over gathered keys; here its twin does, in fp32.

    The reference is the attention segment by segment, which the tests above compare with transformers'.
    """
    model = adapted(folder, torch.float32, "cpu")
    expected = losses_and_gradients(model, share)
    calls: list[int] = []

    def twin(query: Tensor, *rest: Any) -> Tensor:
        calls.append(len(query))
        return attend_by_sequence(query, *rest)

    monkeypatch.setattr(packing, "attends_at_once", lambda query, scaling: twin)
    found = losses_and_gradients(model, share)
    assert len(calls) == 3 * 2  # one in each of two layers
    for name, (loss, gradient) in expected.items():
        assert found[name][0] == pytest.approx(loss, rel=1e-6), name
        assert float(gradient.abs().max()) > 1e-3
        torch.testing.assert_close(found[name][1], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_only_the_kernel_attends_at_once():
    """A processor, fp32 and a factor other than Llama's are computed segment by segment."""
    query = torch.zeros(1, 4, 8, 16)
    assert packing.attends_at_once(query, None) is None
    assert packing.attends_at_once(query, 0.25) is None
    assert packing.attends_at_once(query.bfloat16(), 0.25) is None


@pytest.mark.gpu
@pytest.mark.skipif(not KERNEL, reason="this PyTorch has no variable-length attention")
@pytest.mark.parametrize("share", [True, False])
def test_the_kernel_learns_what_the_processor_does(folder: Path, share: bool):
    """The reference is fp32 on the processor; bf16 has 8 bits."""
    expected = losses_and_gradients(adapted(folder, torch.float32, "cpu"), share)
    model = adapted(folder, torch.bfloat16, "cuda:0")
    assert packing.attends_at_once(torch.zeros(1, 4, 8, 16, dtype=torch.bfloat16, device="cuda:0"), None) is not None
    for name, (loss, gradient) in losses_and_gradients(model, share).items():
        assert loss == pytest.approx(expected[name][0], rel=0.02)
        assert float(torch.cosine_similarity(gradient.cpu(), expected[name][1], dim=0)) > 0.99
