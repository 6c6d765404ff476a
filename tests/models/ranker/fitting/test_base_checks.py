"""The checks of a base model before a training: what is refused, with which sentence, and that nothing else changes."""

import builtins
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, ATTENTION, COMMON, base_of
from ranker_artifacts import write_artifacts
from safetensors.torch import load_file, save_file
from tiny import embedded_base, tiny_base
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from models.ranker.base import find_base
from models.ranker.fitting import base_checks, loop, merge
from models.ranker.fitting.base_checks import check_config, check_layers, first_layers
from models.ranker.fitting.qlora import add_adapters, load_base
from models.ranker.loading import load_causal_lm
from models.ranker.options import PRESETS, RankerTraining
from models.ranker.prompt import Prompt
from models.ranker.training import train_ranker
from preprocessing.errors import InputError

QUICK = RankerTraining(**{**PRESETS["quick"], "max_prompts": 4, "validation_users": 1, "threads": 1})
LETTERS = list(range(49, 69))
STEM = list(range(100, 140))
PROMPTS = [Prompt([*STEM, *range(140, 180)], []), Prompt([*STEM, *range(180, 200)], []), Prompt([*STEM[:20], 7, 8], [])]


def config_of(folder: Path, name: str = "Llama", **changed: object) -> Path:
    """Write a configuration and the tokenizer of 49,152 tokens, without weights, and return the folder."""
    kind = getattr(transformers, ARCHITECTURES[name].kind)
    config = kind.config_class(**{**COMMON, **ARCHITECTURES[name].settings, "architectures": [kind.__name__]})
    config.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    shutil.copyfile(embedded_base() / "tokenizer.json", folder / "tokenizer.json")
    return folder


def check(folder: Path, options: RankerTraining = QUICK) -> None:
    check_config(options, folder, Tokenizer.from_file(str(folder / "tokenizer.json")))


def model_of(name: str, **changed: object) -> Any:
    """Return a random model of an architecture with 300 tokens."""
    kind = getattr(transformers, ARCHITECTURES[name].kind)
    torch.manual_seed(0)
    model = kind(kind.config_class(**{**COMMON, **ARCHITECTURES[name].settings, "vocab_size": 300, **changed})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.requires_grad_(False)


@pytest.mark.parametrize("name", ["GPT-Neo", "GPT-J", "Falcon", "BLOOM", "StableLM"])
def test_an_attention_without_the_interface_is_refused_by_its_configuration(tmp_path: Path, name: str):
    """Such classes look an implementation up by its name, as in PrimeIntellect-ai/prime-rl#2793: a KeyError."""
    with pytest.raises(
        InputError, match=r"does not use transformers' attention interface, so prompts cannot be packed"
    ):
        check(config_of(tmp_path, name))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"model_type": "zamba9000"},
            r"config\.json has the model_type 'zamba9000', which transformers [\d.]+ does not have:",
        ),
        (
            {"model_type": "chatglm", "auto_map": {"AutoConfig": "configuration.C", "AutoModelForCausalLM": "model.M"}},
            "'chatglm', which transformers .* does not have, and the Python code that it brings is never run: choose",
        ),
        (
            {"architectures": ["OtherForCausalLM"], "auto_map": {"AutoModelForCausalLM": "model.OtherForCausalLM"}},
            "names the architecture OtherForCausalLM, .* not have for llama; a base's own Python code is never run",
        ),
        ({"hidden_size": "wide"}, r"config\.json is not a configuration that transformers reads"),
    ],
)
def test_unknown_code_is_refused_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, object], message: str
):
    """By default, transformers asks "Do you wish to run the custom code? [y/N]" (ml-explore/mlx-lm#383)."""
    monkeypatch.setattr(builtins, "input", pytest.fail)
    with pytest.raises(InputError, match=message):
        check(config_of(tmp_path, **changed))


def test_code_beside_a_known_architecture_is_not_needed(tmp_path: Path):
    """Microsoft's Phi-3 has an ``auto_map``, but transformers has its class too."""
    check(config_of(tmp_path, "Phi-3", auto_map={"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}))


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8"])
def test_a_quantised_base_is_refused(tmp_path: Path, method: str):
    """A 4-bit folder does not load as the original weights (unslothai/unsloth#193): adapters need those."""
    folder = tiny_base(tmp_path / "base")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": method}}))
    with pytest.raises(InputError, match=rf"is quantised \({method}\), .* choose the model that it was made from"):
        find_base(str(folder), tmp_path)


def test_a_base_that_bitsandbytes_has_quantised_is_refused(tmp_path: Path):
    """``save_pretrained`` after a load in NF4 stores packed weights (unslothai/unsloth#193)."""
    folder = tiny_base(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(str(folder), quantization_config=config).save_pretrained(tmp_path / "nf4")
    shutil.copyfile(folder / "tokenizer.json", tmp_path / "nf4" / "tokenizer.json")
    with pytest.raises(InputError, match=r"is quantised \(bitsandbytes\)"):
        find_base(str(tmp_path / "nf4"), tmp_path)


@pytest.mark.parametrize("end", [None, []])
def test_letters_need_an_end_token_and_lines_do_not(tmp_path: Path, end: object):
    """Base models may have no end token (hiyouga/LlamaFactory#5599)."""
    folder = config_of(tmp_path, eos_token_id=end)
    check(folder)
    with pytest.raises(InputError, match=r"config\.json has no eos_token_id, .* set it .* or use --read lines"):
        check(folder, replace(QUICK, read="letters"))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path):
    """Ids without an embedding are an IndexError (huggingface/tokenizers#1609); rows to spare are not."""
    with pytest.raises(InputError, match="has token ids up to 49151, but the model has 40000 embeddings: take"):
        check(config_of(tmp_path, vocab_size=40_000))
    check(config_of(tmp_path, vocab_size=49_160))


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("Llama", {"max_position_embeddings": 1536}, "exceed the base's context of 1536: lower --max-tokens to 1535"),
        (
            "Mistral",
            {"sliding_window": 64},
            "attends to 64 tokens and a prompt may have 1536: lower --max-tokens to 64",
        ),
    ],
)
def test_a_prompt_must_fit_the_context_and_the_window(
    tmp_path: Path, name: str, changed: dict[str, object], message: str
):
    """Beyond the context, positions were never trained; beyond a window, tokens are not attended to."""
    with pytest.raises(InputError, match=message):
        check(config_of(tmp_path, name, **changed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("read", ["lines", "letters"])
def test_attention_sinks_are_refused(dtype: torch.dtype, read: str):
    """GPT-OSS adds a learned sink to each softmax, which sdpa does not compute (unslothai/unsloth#3142)."""
    model = model_of("GPT-OSS").to(dtype)
    with pytest.raises(InputError, match="GptOssForCausalLM computes attention in its own way"):
        check_layers(model, replace(QUICK, targets=ATTENTION, read=read), PROMPTS, LETTERS)  # type: ignore[arg-type]


def test_capped_attention_is_refused():
    """A cap of 50 hardly changes small scores, so that no comparison of a random model would find it."""
    with pytest.raises(InputError, match="Gemma2Attention caps its attention scores"):
        check_layers(model_of("Gemma 2"), QUICK, PROMPTS, LETTERS)


@pytest.mark.parametrize(("name", "changed"), [("Granite", {}), ("Cohere", {}), ("Phi", {})])
def test_a_head_that_is_no_product_reads_lines_only(name: str, changed: dict[str, object]):
    """Scaled logits (Granite, Cohere) and a head with biases (Phi) are not what the letters' rows compute."""
    model = model_of(name, **changed)
    check_layers(model, QUICK, PROMPTS, LETTERS)
    with pytest.raises(InputError, match="adds a scale, a cap or a bias to its head's logits: use --read lines"):
        check_layers(model, replace(QUICK, read="letters"), PROMPTS, LETTERS)


def test_experts_get_no_adapters():
    """Wrapped by peft, they would be merged under names that no loader knows (unslothai/unsloth-zoo#812)."""
    model = model_of("Qwen3-MoE")
    message = "adapters on gate_proj, up_proj, down_proj: choose --targets among k_proj, o_proj, q_proj, v_proj"
    with pytest.raises(InputError, match=message):
        check_layers(model, QUICK, PROMPTS, LETTERS)
    check_layers(model, replace(QUICK, targets=ATTENTION), PROMPTS, LETTERS)
    dense = model_of("Qwen3-MoE", mlp_only_layers=[0])  # one layer has gate_proj as a linear layer
    with pytest.raises(InputError, match=message):
        check_layers(dense, QUICK, PROMPTS, LETTERS)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Phi-3", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
        ("OPT", {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
        ("GPT-NeoX", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
        ("GPT-2", {"c_attn", "c_proj", "c_fc"}),
    ],
)
def test_llamas_names_stand_for_the_bases_own(name: str, expected: set[str]):
    """Fused projections got no adapter, without a word (hiyouga/LlamaFactory#4020); all of the layer's get one."""
    adapted = add_adapters(model_of(name), rank=2, alpha=4, dropout=0.0, targets=QUICK.targets)
    found = {
        key.split(".")[-4] for key, weight in adapted.named_parameters() if "lora_A" in key and weight.requires_grad
    }
    assert found == expected


@pytest.mark.parametrize("name", ["Gemma 3", "Qwen3-MoE"])
def test_the_first_layer_of_each_kind_is_copied_in_fp32(name: str):
    """The first and the third of four layers are the first of their kinds: sliding and full, or dense and sparse."""
    changed: dict[str, object] = {
        "Gemma 3": {"layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]},
        "Qwen3-MoE": {"mlp_only_layers": [0, 1]},
    }[name]
    model = model_of(name, num_hidden_layers=4, **changed).to(torch.bfloat16)
    small = first_layers(model)
    assert {parameter.dtype for parameter in small.parameters()} == {torch.float32}
    assert len(model.model.layers) == 4
    for ours, place in zip(small.model.layers, (0, 2), strict=True):
        for key, weight in model.model.layers[place].named_parameters():
            assert torch.equal(ours.get_parameter(key), weight.float())


def test_quantised_layers_are_copied_as_what_they_stand_for(tmp_path: Path):
    """The copy in fp32 has the hidden states of bitsandbytes' own layers in fp32."""
    folder = tiny_base(tmp_path, num_hidden_layers=1)
    model = load_base(folder, quantisation="nf4", dtype=torch.float32, device="cpu")
    small = first_layers(model)
    tokens = torch.tensor([STEM])
    with torch.no_grad():
        found = small.model(input_ids=tokens).last_hidden_state
        expected = model.train().model(input_ids=tokens).last_hidden_state  # in evaluation it repacks the weights
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    "change", [lambda key, weight: (f"{key}.base_layer", weight), lambda key, weight: (key, weight * 1.01)]
)
def test_weights_that_do_not_merge_are_found_before_the_training(monkeypatch: pytest.MonkeyPatch, change: Any):
    """The merged layers are loaded under the names that merging gives them, and must compute what the adapters do."""
    merged = merge.merged_tensors
    monkeypatch.setattr(base_checks, "merged_tensors", lambda *args: [change(*one) for one in merged(*args)])
    with pytest.raises(InputError, match="cannot be merged into LlamaForCausalLM: choose other --targets"):
        check_layers(model_of("Llama"), QUICK, PROMPTS, LETTERS)


def test_the_checks_draw_no_random_number_and_leave_the_base_as_it_is():
    """Otherwise the adapters' first weights, and so every published training, would change."""
    model = model_of("Llama")
    weights = {key: weight.clone() for key, weight in model.state_dict().items()}
    before = torch.get_rng_state()
    check_layers(model, replace(QUICK, read="letters"), PROMPTS, LETTERS)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(weight, weights[key]) for key, weight in model.state_dict().items())


@pytest.mark.parametrize("name", ["GPT-OSS", "Qwen3-MoE"])
def test_a_refused_base_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    """The stage calls the checks: nothing is trained or written."""
    write_artifacts(tmp_path, monkeypatch)
    monkeypatch.setattr("models.ranker.training.training_examples", lambda *args: pytest.fail("it went on"))
    with pytest.raises(InputError, match=r"GptOssForCausalLM computes attention|Qwen3MoeForCausalLM has no linear"):
        train_ranker(QUICK, tmp_path, str(base_of(name, tmp_path / "base")))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "data", "retriever"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda key, weight: (key, weight * 1.5), "the merged model is not the tuned one: .* so nothing was written"),
        (lambda key, weight: (key.replace("q_proj", "q_proj.base_layer"), weight), "lacks weights such as .*q_proj"),
    ],
)
def test_a_merged_model_that_is_not_the_tuned_one_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
):
    """Qwen3-MoE was written with random experts, 26 off in log-probability (unslothai/unsloth-zoo#812)."""
    write_artifacts(tmp_path, monkeypatch)
    monkeypatch.setattr(loop, "plot_curves", lambda *args: None)
    merged = merge.merged_tensors
    monkeypatch.setattr(merge, "merged_tensors", lambda model: (change(*one) for one in merged(model)))
    with pytest.raises(InputError, match=message):
        train_ranker(replace(QUICK, read="letters", depth=None), tmp_path, str(tiny_base(tmp_path / "base")))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "data", "retriever", "ranker-training"}


@pytest.mark.parametrize(
    ("key", "weight", "message"),
    [
        (
            "model.layers.0.self_attn.q_proj.qweight",
            torch.zeros(2),
            "holds weights that LlamaForCausalLM does not have",
        ),
        ("model.norm.weight", torch.zeros(32), r"holds model.norm.weight of shape \[32\], .* asks for \[64\]: again"),
        ("model.norm.weight", None, "lacks weights such as model.norm.weight: again"),
    ],
)
def test_weights_of_another_architecture_are_refused(
    tmp_path: Path, key: str, weight: torch.Tensor | None, message: str
):
    """Otherwise transformers initialises what is missing at random, ignores the rest, and prints a table."""
    file = tiny_base(tmp_path) / "model.safetensors"
    weights = load_file(file)
    weights.pop(key, None)
    save_file(weights if weight is None else {**weights, key: weight}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=message):
        load_causal_lm(tmp_path, "again")


def test_a_damaged_file_of_weights_is_one_sentence(tmp_path: Path):
    """An interrupted download leaves half a file."""
    file = tiny_base(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"cannot be loaded \(.+\): again"):
        load_causal_lm(tmp_path, "again")
