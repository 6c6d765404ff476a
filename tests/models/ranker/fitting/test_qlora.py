"""QLoRA on a tiny Llama: the loss, the effect of an evaluation on the training, and the merged model."""

import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_base
from transformers import (
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Qwen2ForCausalLM,
)

from models.ranker.fitting import merge
from models.ranker.fitting.merge import CHANGED, merged_tensors, save_merged
from models.ranker.fitting.qlora import (
    add_adapters,
    answer_loss,
    evaluating,
    letter_logits,
    load_base,
)
from models.ranker.inference.scorer import Runtime
from models.ranker.inference.torch_scorer import TorchScorer
from preprocessing.errors import InputError

PROMPTS = [[5, 6, 7, 8, 9], [10, 11, 12]]
ANSWERS = [[49, 2], [50, 2]]
LETTERS = list(range(49, 69))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


def adapted(folder: Path, quantisation: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a base with adapters that change its output; new ones add nothing until their second matrix is trained."""
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
    """The reference is transformers' causal loss, one unpadded prompt at a time, all but the answer labelled -100."""
    model = adapted(folder, "none")
    expected = 0.0
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        tokens = torch.tensor([[*prompt, *answer]])
        labels = torch.tensor([[*[-100] * len(prompt), *answer]])
        expected += float(model(input_ids=tokens, labels=labels).loss.detach()) * len(answer)
    assert float(answer_loss(model, PROMPTS, ANSWERS).detach()) == pytest.approx(expected, rel=1e-5)


def test_letter_logits_are_the_full_heads(folder: Path):
    """The reference is the letters' rows of transformers' full logits at the last position."""
    model = adapted(folder, "none")
    with evaluating(model):
        expected = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1, LETTERS]
        assert torch.allclose(letter_logits(model, PROMPTS[0], LETTERS), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_survive_an_evaluation(folder: Path, dtype: torch.dtype):
    """In an evaluation, bitsandbytes repacks NF4 weights; the gradient must be bit-identical before and after."""
    model = adapted(folder, "nf4", dtype)
    before = gradients(model)
    with evaluating(model):
        letter_logits(model, PROMPTS[0], LETTERS)
    assert model.training
    assert before.abs().max() > 0
    assert torch.equal(gradients(model), before)


@pytest.mark.parametrize("quantisation", ["nf4", "none"])
def test_merged_model_scores_as_the_unmerged_one(folder: Path, tmp_path: Path, quantisation: str):
    """After a strict load into a plain Llama, log-probabilities agree within 2e-5 in fp32, and 0.015 in stored fp16."""
    model = adapted(folder, quantisation)
    with evaluating(model):
        expected = letter_logits(model, PROMPTS[0], LETTERS).log_softmax(0)
    save_merged(model, folder, tmp_path / "merged")
    plain = LlamaForCausalLM.from_pretrained(str(folder)).eval()
    head = plain.lm_head.weight  # tied: the stored weights name it once
    for weights, tolerance in (
        (dict(merged_tensors(model, torch.float32)), 2e-5),
        (LlamaForCausalLM.from_pretrained(str(tmp_path / "merged")).state_dict(), 0.015),
    ):
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
        plain.load_state_dict(weights, strict=True)
        assert plain.lm_head.weight is head
        with torch.inference_mode():
            logits = plain(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1, LETTERS]
        assert (logits.log_softmax(0) - expected).abs().max() < tolerance


def test_merging_twice_gives_the_same(folder: Path):
    """Merging reads the model and does not change it, even with an evaluation in between."""
    model = adapted(folder, "nf4", torch.bfloat16)
    first = dict(merged_tensors(model))
    with evaluating(model):
        letter_logits(model, PROMPTS[0], LETTERS)
    second = dict(merged_tensors(model))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_merged_folder_is_an_ordinary_one(folder: Path, tmp_path: Path):
    """The folder has fp16 weights under the base's names, its configuration without quantisation, and its tokenizer."""
    save_merged(adapted(folder, "nf4"), folder, tmp_path)
    merged = LlamaForCausalLM.from_pretrained(str(tmp_path))
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float16}
    assert merged.state_dict().keys() == LlamaForCausalLM.from_pretrained(str(folder)).state_dict().keys()
    assert not hasattr(merged.config, "quantization_config")
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_merged_model_carries_its_bases_licence_and_says_that_it_was_changed(folder: Path, tmp_path: Path):
    """Llama 2's licence (1b) requires its text and notice with a derivative, Apache's (4b) a note of the change."""
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    for name in ("LICENSE.txt", "USE_POLICY.md", "NOTICE"):
        (base / name).write_text(f"the base's {name}\n")
    save_merged(adapted(folder, "none"), base, tmp_path / "merged")
    assert (tmp_path / "merged" / "LICENSE.txt").read_text() == "the base's LICENSE.txt\n"
    assert (tmp_path / "merged" / "USE_POLICY.md").is_file()
    assert (tmp_path / "merged" / "NOTICE").read_text() == f"the base's NOTICE\n\n{CHANGED}"


def test_shards_hold_the_same_model_and_no_more_than_their_size(folder: Path, tmp_path: Path):
    """Shards cut at 100,000 bytes load as the same model as a single file.

    Only the embedding, which is larger, exceeds this size, in a shard that contains nothing else.
    """
    model = adapted(folder, "nf4")
    save_merged(model, folder, tmp_path / "whole")
    save_merged(model, folder, tmp_path / "cut", shard_bytes=100_000)
    shards = sorted((tmp_path / "cut").glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        with safe_open(shard, "pt") as tensors:
            sizes = [tensors.get_tensor(name).nbytes for name in tensors.keys()]  # noqa: SIM118
        assert sum(sizes) <= 100_000 or len(sizes) == 1
    whole, cut = (LlamaForCausalLM.from_pretrained(str(tmp_path / name)).state_dict() for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_merging_holds_a_shard_and_a_tensor_at_a_time(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At most one shard and one more tensor are alive at a time, which allows merging 7B in 16 GB."""
    made: list[tuple[weakref.ref[torch.Tensor], int]] = []
    most = 0

    def watched(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for name, tensor in merged_tensors(model):
            made.append((weakref.ref(tensor), tensor.nbytes))
            most = max(most, sum(size for alive, size in made if alive() is not None))
            yield name, tensor
            del tensor

    monkeypatch.setattr(merge, "merged_tensors", watched)
    save_merged(adapted(folder, "nf4"), folder, tmp_path, shard_bytes=100_000)
    sizes = [size for _, size in made]
    assert sum(sizes) > 100_000 + max(sizes)
    assert most <= 100_000 + max(sizes)


def other_base(folder: Path, architecture: type, **changed: object) -> Path:
    """Write a tiny random model that is not a Llama, and return its folder."""
    torch.manual_seed(0)
    settings = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    architecture(architecture.config_class(**{**settings, **changed})).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("architecture", "changed", "target"),
    [
        (Qwen2ForCausalLM, {"num_key_value_heads": 2, "intermediate_size": 64}, "q_proj"),
        (GPT2LMHeadModel, {}, "c_attn"),
    ],
)
def test_other_causal_models_are_trained_and_merged_alike(
    tmp_path: Path, architecture: type, changed: dict[str, object], target: str
):
    """Models with biases, learned positions or tied heads can be trained and merged like Llama.

    Their packed scores equal the unpacked ones, the adapters get gradients, and the merged model has the same logits.
    """
    base = other_base(tmp_path / "base", architecture, **changed)
    model = load_base(base, quantisation="none", dtype=torch.float32, device="cpu")
    model = add_adapters(model, rank=4, alpha=16, dropout=0.0, targets=(target,))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    assert gradients(model).abs().max() > 0
    with evaluating(model):
        expected = letter_logits(model, PROMPTS[0], LETTERS)
    save_merged(model, base, tmp_path / "merged")
    merged = TorchScorer(tmp_path / "merged", Runtime()).score(PROMPTS[:1], LETTERS)[0]
    assert merged == pytest.approx(expected.numpy(), abs=0.01)


def test_missing_weights_and_projections_are_named(folder: Path, tmp_path: Path):
    """Missing weights would be initialised at random, and adapters without a projection would train nothing."""
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = load_file(broken / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks weights such as model.layers.1.mlp.up_proj.weight"):
        load_base(broken, quantisation="none", dtype=torch.float32, device="cpu")
    model = load_base(folder, quantisation="none", dtype=torch.float32, device="cpu")
    with pytest.raises(
        InputError,
        match="has no linear layers for adapters on c_attn: choose --targets among down_proj",
    ):
        add_adapters(model, rank=4, alpha=16, dropout=0.0, targets=("c_attn",))
    with pytest.raises(InputError, match="layers is 3, but the base has 2 layers"):
        add_adapters(model, rank=4, alpha=16, dropout=0.0, targets=("q_proj",), layers=3)
