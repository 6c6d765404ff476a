"""Merges a quantised base and its adapters into one plain model, tensor by tensor."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

SHARD_BYTES = 2 << 30
"""Maximum size of a safetensors file. Memory holds one shard, the base and one tensor in fp32: about 8 GB for 7B in
NF4."""
BASE_LAYER = ".base_layer"
INDEX_FILE = "model.safetensors.index.json"
COPIED = ("tokenizer*", "special_tokens_map.json", "LICENSE*", "USE_POLICY*")
NOTICE_FILE = "NOTICE"
CHANGED = (
    "This model was changed: low-rank adapters trained to rank a catalogue's items were added to the base model's"
    " weights (llamarec train-ranker).\n"
)
"""Notice that the Apache License (4b) and Llama 2's licence (1b) require in a derivative work."""


def merged_tensors(model: Any, dtype: torch.dtype = torch.float16) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a plain model with the trained model's scores, one by one under the base's names.

    Adapters are added in fp32 to the dequantised weights of the base, since those are the weights they were trained on.
    If they were added to the original weights, or the sum were quantised again, log-probabilities would change by more
    than 1.

    Args:
        model: a model of :func:`models.ranker.fitting.qlora.add_adapters`.
        dtype: stored precision; fp16 keeps the scores within 0.015.
    """
    base = model.get_base_model()
    tied = base.get_output_embeddings() if base.config.tie_word_embeddings else None
    for name, module in base.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            if ".lora_" in name or module is tied:
                continue
            state = getattr(parameter, "quant_state", None)
            value = parameter.detach() if state is None else dequantize_4bit(parameter.data, state)
            if kind == "weight" and name.endswith(BASE_LAYER):
                layer = base.get_submodule(name.removesuffix(BASE_LAYER))
                value = value.float() + layer.get_delta_weight("default").float()
            if (
                state is not None and getattr(module, "source_cls", None) is Conv1D
            ):  # GPT-2's, which is quantised transposed
                value = value.T
            yield f"{name.removesuffix(BASE_LAYER)}.{kind}", value.detach().to(dtype).cpu().contiguous()


def save_merged(model: Any, base: Path, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the merged model as a Hugging Face folder in fp16, with the base's tokenizer, licence and notice.

    Args:
        model: a model of :func:`models.ranker.fitting.qlora.add_adapters`.
        base: folder of the base.
        folder: folder to write; created if absent.
        shard_bytes: maximum size of a weights file; a larger tensor gets a file of its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _save_sharded(merged_tensors(model), folder, shard_bytes)
    config = model.get_base_model().config.__class__.from_pretrained(str(base))
    config.dtype = torch.float16
    for name in ("num_hidden_layers", "layer_types"):  # they differ from the base's if its upper layers were cut off
        if hasattr(config, name):
            setattr(config, name, getattr(model.config, name))
    config.save_pretrained(folder)
    for pattern in COPIED:
        for file in base.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    notices = [path.read_text(encoding="utf-8") for path in sorted(base.glob(f"{NOTICE_FILE}*"))]
    (folder / NOTICE_FILE).write_text("\n".join([*notices, CHANGED]), encoding="utf-8")


def _save_sharded(tensors: Iterator[tuple[str, Tensor]], folder: Path, shard_bytes: int) -> None:
    """Write tensors as they arrive, to ``model.safetensors`` or to numbered shards with transformers' index."""
    shard: dict[str, Tensor] = {}
    held, total = 0, 0
    written: list[list[str]] = []

    def flush() -> None:
        nonlocal held
        save_file(shard, folder / f".shard-{len(written)}", metadata={"format": "pt"})
        written.append(list(shard))
        shard.clear()
        held = 0

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if shard and held + size > shard_bytes:
            flush()
        shard[name] = tensor
        held, total = held + size, total + size
    flush()
    if len(written) == 1:
        (folder / ".shard-0").rename(folder / "model.safetensors")
        return
    shard_of = {}
    for number, names in enumerate(written):
        file = f"model-{number + 1:05}-of-{len(written):05}.safetensors"
        (folder / f".shard-{number}").rename(folder / file)
        shard_of.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(shard_of.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
