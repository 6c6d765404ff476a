"""Tiny random bases of many architectures, with SmolLM2's real tokenizer."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tiny import embedded_base

COMMON = {
    "vocab_size": 49152,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
WINDOW = {"sliding_window": 2048}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class Architecture(NamedTuple):
    """An architecture of transformers and how a ranker is trained from it."""

    kind: str
    """Class in transformers."""
    settings: Mapping[str, Any] = {}
    """Settings that differ from :data:`COMMON`."""
    targets: tuple[str, ...] | None = None
    """The ``--targets``; those of the preset if absent."""


ARCHITECTURES: Mapping[str, Architecture] = {
    "Llama": Architecture("LlamaForCausalLM"),
    "Llama 3 with scaled rotary positions": Architecture("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "Mistral": Architecture("MistralForCausalLM", {"sliding_window": None}),
    "Mixtral": Architecture("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}, ATTENTION),
    "Qwen2": Architecture("Qwen2ForCausalLM"),
    "Qwen3": Architecture("Qwen3ForCausalLM", {"head_dim": 16}),
    "Qwen3-MoE": Architecture("Qwen3MoeForCausalLM", {"head_dim": 16, "num_experts": 4, **EXPERTS}, ATTENTION),
    "Gemma": Architecture("GemmaForCausalLM", {"head_dim": 16}),
    "Gemma 2": Architecture("Gemma2ForCausalLM", {"head_dim": 16, **WINDOW}),
    "Gemma 3": Architecture("Gemma3ForCausalLM", {"head_dim": 16, **WINDOW}),
    "Phi": Architecture("PhiForCausalLM"),
    "Phi-3": Architecture("Phi3ForCausalLM"),
    "OLMo": Architecture("OlmoForCausalLM"),
    "OLMo 2": Architecture("Olmo2ForCausalLM"),
    "SmolLM3": Architecture("SmolLM3ForCausalLM"),
    "StableLM": Architecture("StableLmForCausalLM"),
    "Granite": Architecture("GraniteForCausalLM", {"logits_scaling": 8.0, "residual_multiplier": 0.22}),
    "Cohere": Architecture("CohereForCausalLM"),
    "GPT-OSS": Architecture(
        "GptOssForCausalLM", {"head_dim": 16, "num_local_experts": 4, **EXPERTS, **WINDOW}, ATTENTION
    ),
    "GPT-2": Architecture("GPT2LMHeadModel", {"n_positions": 2048}),
    "GPT-Neo": Architecture("GPTNeoForCausalLM", {"attention_types": [[["global", "local", "global"], 1]]}),
    "GPT-NeoX": Architecture("GPTNeoXForCausalLM"),
    "GPT-J": Architecture("GPTJForCausalLM", {"n_positions": 2048, "rotary_dim": 16}),
    "Falcon": Architecture("FalconForCausalLM"),
    "OPT": Architecture("OPTForCausalLM", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "BLOOM": Architecture("BloomForCausalLM"),
}
"""Architectures by the name that the documentation uses."""


def base_of(name: str, folder: Path, **changed: object) -> Path:
    """Write a tiny random base of an architecture and return its folder; no vector of it is all zeros or ones.

    Args:
        name: a key of :data:`ARCHITECTURES`.
        folder: folder to write.
        changed: further entries of its configuration.
    """
    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    kind = getattr(transformers, architecture.kind)
    model = kind(kind.config_class(**{**COMMON, **architecture.settings, **changed}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms, biases and attention sinks, which are trained in a real base
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(embedded_base() / file, folder / file)
    return folder
