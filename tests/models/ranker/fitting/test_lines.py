"""Scoring candidates by their lines: the loss, the scores of a validation, and bases that cannot be cut."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_base
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from models.ranker.examples.sampling import Example
from models.ranker.fitting.merge import save_merged
from models.ranker.fitting.objective import LetterObjective, LineObjective, Objective
from models.ranker.fitting.packing import SHORTEST_SHARED
from models.ranker.fitting.qlora import add_adapters, evaluating, line_logits, line_loss, load_base
from models.ranker.prompt import Prompt

STEM = list(range(100, 100 + 2 * SHORTEST_SHARED))
PROMPTS = [
    Prompt([*STEM, 7, 8, 9, 10, 11], [33, 34, 36]),
    Prompt([*STEM, 8, 8, 6], [33, 34]),
    Prompt([11, 12, 13, 14], [1, 2, 3]),
]
TRUTHS = [1, 0, 2]
SCORES = [
    np.array([2.0, 0.0, 1.0], np.float32),
    np.array([0.0, 0.0], np.float32),
    np.array([5.0, 4.0, 3.0], np.float32),
]


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """Return a model of two layers with adapters that change its output."""
    model = load_base(tiny_base(tmp_path), quantisation="none", dtype=torch.float32, device="cpu")
    model = add_adapters(model, rank=4, alpha=16, dropout=0.0, targets=("q_proj", "v_proj"))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def says(model: Any, prompt: Prompt, direction: torch.Tensor) -> torch.Tensor:
    """Return the line scores by definition, from transformers' last hidden states of one prompt, after the norm."""
    states = model(input_ids=torch.tensor([prompt.tokens]), output_hidden_states=True).hidden_states[-1][0]
    return states[prompt.line_ends] @ direction


@pytest.mark.parametrize("share", [True, False])
def test_the_loss_is_that_of_each_prompt_read_alone(model: Any, share: bool):
    """The loss equals the definition, computed for one unpacked prompt at a time.

    It is the cross-entropy of the sum of the retriever's and the lines' log-probabilities.
    """
    direction = torch.randn(64)
    priors = [torch.from_numpy(row).log_softmax(0) for row in SCORES]
    expected = -sum(
        (prior + says(model, prompt, direction)).log_softmax(0)[truth]
        for prompt, truth, prior in zip(PROMPTS, TRUTHS, priors, strict=True)
    )
    ours = line_loss(model, direction, PROMPTS, TRUTHS, priors, share=share)
    assert float(ours.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_at_first_the_loss_is_the_retrievers_and_both_learn(model: Any):
    """A direction of zeros gives the retriever's cross-entropy alone; afterwards the adapters get a gradient too."""
    objective = LineObjective(model)
    examples = [
        Example(np.array([1]), np.arange(len(row)), truth, row) for truth, row in zip(TRUTHS, SCORES, strict=True)
    ]
    alone = -sum(torch.from_numpy(row).log_softmax(0)[truth] for row, truth in zip(SCORES, TRUTHS, strict=True))
    loss = objective.loss(model, PROMPTS, examples)
    assert float(loss.detach()) == pytest.approx(float(alone), rel=1e-6)
    loss.backward()
    (direction,) = objective.trained
    assert direction.grad is not None
    assert direction.grad.abs().max() > 0
    with torch.no_grad():
        direction.normal_()
    objective.loss(model, PROMPTS, examples).backward()
    assert all(float(p.grad.abs().max()) > 0 for p in model.parameters() if p.requires_grad)


def test_validation_reads_what_the_loss_teaches(model: Any):
    """The expected scores of one prompt in evaluation mode follow from the definition."""
    direction = torch.randn(64)
    with evaluating(model):
        found = line_logits(model, direction, PROMPTS[0])
        assert found.numpy() == pytest.approx(says(model, PROMPTS[0], direction).numpy(), abs=1e-4)


def test_a_cut_base_is_the_lower_layers_of_the_whole_one(tmp_path: Path):
    """The normalised states of the cut base are transformers' states after the first layer, normalised."""
    folder = tiny_base(tmp_path)
    given = {"quantisation": "none", "dtype": torch.float32, "device": "cpu"}
    whole, cut = load_base(folder, **given), load_base(folder, **given, depth=1)
    tokens = torch.tensor([STEM])
    behind = whole(input_ids=tokens, output_hidden_states=True).hidden_states[1]
    found = cut.get_decoder()(input_ids=tokens).last_hidden_state
    assert torch.allclose(found, whole.get_decoder().norm(behind), atol=1e-5)


def test_a_base_that_lists_its_layers_is_merged_with_those_that_are_left(tmp_path: Path):
    """Qwen 2 names an attention type for each of three layers; cut to two and merged, it loads with the same logits."""
    folder = tmp_path / "qwen"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=200, num_hidden_layers=3, **sizes)).save_pretrained(folder)
    cut = load_base(folder, quantisation="none", dtype=torch.float32, device="cpu", depth=2)
    save_merged(add_adapters(cut, rank=2, alpha=4, dropout=0.0, targets=("q_proj",)), folder, tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"), dtype=torch.float32)
    assert (len(again.model.layers), len(again.config.layer_types)) == (2, 2)
    tokens = torch.tensor([STEM])
    assert torch.allclose(again(input_ids=tokens).logits, cut(input_ids=tokens).logits, atol=1e-2)


def test_a_depth_is_a_maximum_and_gpt_2_has_layers_too(tmp_path: Path):
    """A preset's depth of 12 leaves a base of 2 layers as it is, and GPT-2's list of layers is found by its name."""
    folder = tiny_base(tmp_path / "llama")
    given = {"quantisation": "none", "dtype": torch.float32, "device": "cpu"}
    assert len(load_base(folder, **given, depth=12).model.layers) == 2
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2)).save_pretrained(tmp_path / "gpt2")
    cut = load_base(tmp_path / "gpt2", **given, depth=1)
    assert (len(cut.transformer.h), cut.config.n_layer) == (1, 1)


@pytest.mark.parametrize("read", ["letters", "lines", "independent-lines"])
def test_a_step_reads_nothing_back_from_its_device(model: Any, read: str, monkeypatch: pytest.MonkeyPatch):
    """On a GPU each number that is read back waits for all that is being computed. PyTorch's device ``meta`` computes
    nothing, so any operation whose result, or whose size, the processor would have to read raises an error there.
    """
    model.to("meta")
    monkeypatch.setattr(torch, "autocast", lambda *given, **named: nullcontext())  # off in fp32, and unknown there
    objective: Objective = LetterObjective(list(range(49, 69)), 2) if read == "letters" else LineObjective(model)
    prompts = [Prompt(p.tokens, p.line_ends, 30 if read == "independent-lines" else 0) for p in PROMPTS[:2]]
    examples = [Example([], np.array([1, 2, 3]), truth, scores) for truth, scores in zip(TRUTHS, SCORES, strict=True)]
    loss = objective.loss(model, prompts, examples[:2])
    torch.autograd.backward(loss)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in (*trained, *objective.trained))
    with pytest.raises(RuntimeError, match="meta"):
        float(loss.detach())
