"""Writes models of known shapes with random weights, which take as long as trained ones."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.ranker.fitting.merge import INDEX_FILE
from models.ranker.prompt import TOKENIZER_FILE

SPREAD = 0.02
"""Standard deviation of the weights, Llama's initial one."""
Sizes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Shape:
    """The shape of a Llama-like model. Its vocabulary is that of the embedded base, whose tokenizer it gets."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    tied: bool
    """Whether the head is the embedding."""

    def layer_weights(self) -> int:
        """Return the number of weights in one layer's matrices."""
        return 2 * self.hidden**2 * (self.heads + self.key_heads) // self.heads + 3 * self.hidden * self.inner

    def operations(self, tokens: int) -> float:
        """Return the floating-point operations of a pass over the layers; causal attention counts half."""
        return float(self.layers * (2 * self.layer_weights() * tokens + 2 * self.hidden * tokens**2))


LLAMA_2_7B = Shape("Llama 2 7B", 4096, 11008, 32, 32, 32, tied=False)
LLAMA_32_1B = Shape("Llama 3.2 1B", 2048, 8192, 16, 32, 8, tied=True)
SMOLLM2 = Shape("SmolLM2 135M", 576, 1536, 30, 9, 3, tied=True)
TINY = Shape("tiny", 64, 128, 2, 4, 2, tied=True)


def write_model(shape: Shape, tokenizer_of: Path, folder: Path, device: str) -> Path:
    """Write a Hugging Face folder of a model in fp16 with seeded random weights, a file for each layer; return it.

    Args:
        shape: the model's shape.
        tokenizer_of: folder of the base whose tokenizer, and so whose vocabulary, the model gets.
        folder: folder to write.
        device: device that draws the weights; another kind of device draws others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    base = json.loads((tokenizer_of / "config.json").read_text(encoding="utf-8"))
    config = {
        **base,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "tie_word_embeddings": shape.tied,
        "dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    for name in (TOKENIZER_FILE, "tokenizer_config.json"):
        shutil.copyfile(tokenizer_of / name, folder / name)
    draw = torch.Generator(device).manual_seed(0)
    files: dict[str, str] = {}
    total = 0
    for number, weights in enumerate(_parts(shape, base["vocab_size"])):
        tensors = {name: _drawn(size, draw, device) for name, size in weights.items()}
        file = f"model-{number:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, file)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / INDEX_FILE).write_text(json.dumps(index) + "\n", encoding="utf-8")
    return folder


def _parts(shape: Shape, vocabulary: int) -> Iterator[Sizes]:
    """Yield the sizes of the weights of each file by name."""
    hidden, keys = shape.hidden, shape.hidden // shape.heads * shape.key_heads
    ends: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    yield ends if shape.tied else {**ends, "lm_head.weight": (vocabulary, hidden)}
    sizes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (shape.inner, hidden),
        "mlp.up_proj": (shape.inner, hidden),
        "mlp.down_proj": (hidden, shape.inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    for layer in range(shape.layers):
        yield {f"model.layers.{layer}.{name}.weight": size for name, size in sizes.items()}


def _drawn(size: tuple[int, ...], draw: torch.Generator, device: str) -> Tensor:
    """Return random weights of a matrix, or the ones of a norm."""
    if len(size) == 1:
        return torch.ones(size, dtype=torch.float16)
    return torch.randn(size, generator=draw, device=device).mul_(SPREAD).half().cpu()
