"""A tiny random Llama with SmolLM2's real tokenizer, for tests that need a ranker's pipeline and not its quality."""

import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from models.ranker.base import EMBEDDED, find_base


@cache
def embedded_base() -> Path:
    """Return the embedded base, which is converted once and kept between test runs."""
    return find_base(EMBEDDED, Path(tempfile.gettempdir()) / "llamarec-tests-licensed")


def tiny_base(folder: Path, **changed: object) -> Path:
    """Write a Hugging Face folder of a random Llama (hidden 64, 2 layers, tied embeddings) and return it.

    Args:
        folder: folder to write.
        changed: entries of its configuration.
    """
    torch.manual_seed(0)
    settings: dict[str, object] = {
        "vocab_size": 49152,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    LlamaForCausalLM(LlamaConfig(**{**settings, **changed})).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(embedded_base() / name, folder / name)
    return folder
