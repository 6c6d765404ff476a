"""Computes how much GPU memory a language model needs, and refuses one that does not fit before it is loaded.

The parameters are counted on a model without data (PyTorch's device ``meta``), so every architecture is counted as it
is loaded, whichever names its weights have.
"""

import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from models.ranker.prompt import PromptSettings
from preprocessing.errors import InputError

NF4_BYTES = 0.5 + (1 + 4 / 256) / 64
"""Bytes of a weight in NF4 with double quantisation: 4 bits, a scale of one byte for 64 weights, and one of four bytes
for 256 scales."""
PROMPT_TOKENS = PromptSettings.max_tokens
"""Length of the prompt whose activations are counted: the default maximum. Longer prompts need proportionally more."""
WIDE_TENSORS = 4
"""Number of tensors as wide as the widest layer that a forward pass holds at a time: in a Llama's MLP, the gate, its
activation, the values it multiplies, and their product. The fused attention kernels need less."""


def empty_model(folder: Path) -> Any:
    """Return the model of a Hugging Face folder with all its modules and shapes, but without any data."""
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def serving_bytes(folder: Path, dtype: torch.dtype, matrix_bytes: int | None = None) -> int:
    """Return the bytes that a scorer of :mod:`models.ranker.inference` needs on a GPU.

    These are the layers' parameters in ``dtype`` and the activations of one prompt of :data:`PROMPT_TOKENS` tokens. The
    head is not among them: it stays in the processor's memory.

    Args:
        folder: the merged model's Hugging Face folder.
        dtype: precision of the layers.
        matrix_bytes: bytes of an element of the layers' matrices, if not those of ``dtype``.
    """
    layers = empty_model(folder).get_decoder()
    embeddings = layers.get_input_embeddings().weight
    widest = max(max(parameter.shape) for parameter in layers.parameters() if parameter is not embeddings)
    matrices = sum(each.weight.numel() for each in layers.modules() if isinstance(each, torch.nn.Linear))
    others: int = sum(parameter.numel() for parameter in layers.parameters()) - matrices
    activations = WIDE_TENSORS * PROMPT_TOKENS * int(widest)
    return matrices * (matrix_bytes or dtype.itemsize) + (others + activations) * dtype.itemsize


def training_bytes(model: Any, dtype: torch.dtype, *, nf4: bool) -> int:
    """Return the bytes of a frozen base's parameters, which a training needs at least.

    Adapters, their optimiser and the activations come on top; how much depends on the batch and on gradient
    checkpointing.

    Args:
        model: a model of :func:`empty_model`, cut to the layers that are moved to the GPU.
        dtype: precision of what is not quantised.
        nf4: whether the linear layers are in NF4; embeddings, norms, biases and the head never are.
    """
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    quantised = sum(module.weight.numel() for module in linear) if nf4 else 0
    others: int = sum(parameter.numel() for parameter in model.parameters()) - quantised
    return math.ceil(quantised * NF4_BYTES) + others * dtype.itemsize


def check_gpu_memory(folder: Path, needed: int, device: str, remedy: str) -> None:
    """Check that a GPU has ``needed`` bytes of free memory for the model in ``folder``.

    Args:
        folder: the model's Hugging Face folder.
        needed: number of bytes.
        device: PyTorch's name of the GPU; without a number, the current one.
        remedy: what to do instead, apart from using another GPU.

    Raises:
        InputError: less is free.
    """
    free, total = torch.cuda.mem_get_info(device)
    if needed > free:
        raise InputError(
            f"{folder} needs at least {math.ceil(needed / 2**20):,} MiB of GPU memory, and {free // 2**20:,} of"
            f" {total // 2**20:,} MiB are free on {device}: free some, use another GPU, {remedy}"
        )
