"""One plain model out of a quantised base and its adapters."""

import shutil
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from huggingface_hub import save_torch_state_dict
from torch import Tensor

SHARD_SIZE = "4GB"
BASE_LAYER = ".base_layer"


def merged_weights(model: Any, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """Weights of the plain model that scores as the trained one does, under the base's own names.

    Adapters are added in fp32 to what the quantised base dequantises to: those are the weights they were trained on.
    Added to the original weights they would score differently by more than 1 in log-probability, and so would they
    after a second quantisation.

    Args:
        model: of :func:`models.ranker.qlora.add_adapters`.
        dtype: stored precision; fp16 keeps the scores within 0.015.
    """
    llama = model.get_base_model()
    weights: dict[str, Tensor] = {}
    for name, module in llama.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            if ".lora_" in name:
                continue
            state = getattr(parameter, "quant_state", None)
            value = parameter.detach() if state is None else dequantize_4bit(parameter.data, state)
            value = value.float()
            if kind == "weight" and name.endswith(BASE_LAYER):
                layer = llama.get_submodule(name.removesuffix(BASE_LAYER))
                value = value + layer.get_delta_weight("default").float()
            weights[f"{name.removesuffix(BASE_LAYER)}.{kind}"] = value.to(dtype).cpu().contiguous()
    if llama.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    return weights


def save_merged(model: Any, base: Path, folder: Path) -> None:
    """Writes the merged model as a Hugging Face folder in fp16, with the base's tokenizer and licence files.

    Args:
        model: of :func:`models.ranker.qlora.add_adapters`.
        base: folder of the base.
        folder: to write; made if absent.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(merged_weights(model), folder, max_shard_size=SHARD_SIZE)
    config = model.get_base_model().config.__class__.from_pretrained(str(base))
    config.dtype = torch.float16
    config.save_pretrained(folder)
    for pattern in ("tokenizer*", "special_tokens_map.json", "LICENSE*", "NOTICE*", "USE_POLICY*"):
        for file in base.glob(pattern):
            shutil.copyfile(file, folder / file.name)
