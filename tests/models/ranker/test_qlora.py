"""QLoRA on a tiny Llama: the loss, what an evaluation leaves behind, and the merged model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import tiny_base
from transformers import LlamaForCausalLM

from models.ranker.merge import merged_weights, save_merged
from models.ranker.qlora import add_adapters, answer_loss, evaluating, letter_logits, load_base

PROMPTS = [[5, 6, 7, 8, 9], [10, 11, 12]]
ANSWERS = [[49, 2], [50, 2]]
LETTERS = list(range(49, 69))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


def adapted(folder: Path, quantisation: str, dtype: torch.dtype = torch.float32) -> Any:
    """A base with adapters that do something: freshly made ones add nothing until their second matrix is trained."""
    model = load_base(folder, quantisation=quantisation, dtype=dtype, device="cpu")
    model = add_adapters(model, rank=4, alpha=16, dropout=0.0, targets=("q_proj", "v_proj"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def gradients(model: PeftModel) -> torch.Tensor:
    model.zero_grad()
    answer_loss(model, PROMPTS, ANSWERS).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None])


def test_loss_is_that_of_the_answers_alone(folder: Path):
    """The causal loss of transformers, one unpadded prompt at a time, everything but the answer labelled -100."""
    model = adapted(folder, "none")
    expected = 0.0
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        tokens = torch.tensor([[*prompt, *answer]])
        labels = torch.tensor([[*[-100] * len(prompt), *answer]])
        expected += float(model(input_ids=tokens, labels=labels).loss.detach()) * len(answer)
    assert float(answer_loss(model, PROMPTS, ANSWERS).detach()) == pytest.approx(expected, rel=1e-5)


def test_letter_logits_are_the_full_heads(folder: Path):
    """The rows of the letters of transformers' full logits at the last position."""
    model = adapted(folder, "none")
    with evaluating(model):
        expected = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1, LETTERS]
        assert torch.allclose(letter_logits(model, PROMPTS[0], LETTERS), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_survive_an_evaluation(folder: Path, dtype: torch.dtype):
    """An evaluation lets bitsandbytes repack NF4 weights: the gradient must be the same to the bit before and after."""
    model = adapted(folder, "nf4", dtype)
    before = gradients(model)
    with evaluating(model):
        letter_logits(model, PROMPTS[0], LETTERS)
    assert model.training
    assert before.abs().max() > 0
    assert torch.equal(gradients(model), before)


@pytest.mark.parametrize("quantisation", ["nf4", "none"])
def test_merged_model_scores_as_the_unmerged_one(folder: Path, tmp_path: Path, quantisation: str):
    """Log-probabilities after a strict load into a plain Llama: within 2e-5 in fp32, 0.015 as stored in fp16."""
    model = adapted(folder, quantisation)
    with evaluating(model):
        expected = letter_logits(model, PROMPTS[0], LETTERS).log_softmax(0)
    save_merged(model, folder, tmp_path / "merged")
    plain = LlamaForCausalLM.from_pretrained(str(folder)).eval()
    head = plain.lm_head.weight  # tied: the stored weights name it once
    for weights, tolerance in (
        (merged_weights(model, torch.float32), 2e-5),
        (LlamaForCausalLM.from_pretrained(str(tmp_path / "merged")).state_dict(), 0.015),
    ):
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
        plain.load_state_dict(weights, strict=True)
        assert plain.lm_head.weight is head
        with torch.inference_mode():
            logits = plain(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1, LETTERS]
        assert (logits.log_softmax(0) - expected).abs().max() < tolerance


def test_merging_twice_gives_the_same(folder: Path):
    """Merging reads the model and changes nothing in it, an evaluation in between included."""
    model = adapted(folder, "nf4", torch.bfloat16)
    first = merged_weights(model)
    with evaluating(model):
        letter_logits(model, PROMPTS[0], LETTERS)
    second = merged_weights(model)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_merged_folder_is_an_ordinary_one(folder: Path, tmp_path: Path):
    """fp16 weights under the base's own names, its configuration without quantisation, and its tokenizer."""
    save_merged(adapted(folder, "nf4"), folder, tmp_path)
    merged = LlamaForCausalLM.from_pretrained(str(tmp_path))
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float16}
    assert merged.state_dict().keys() == LlamaForCausalLM.from_pretrained(str(folder)).state_dict().keys()
    assert not hasattr(merged.config, "quantization_config")
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
