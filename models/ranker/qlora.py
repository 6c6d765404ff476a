"""QLoRA: a frozen 4-bit base with low-rank adapters, its loss on the answer alone, and its letters' logits.

Source: Dettmers et al. 2023 (NF4, double quantisation); Hu et al. 2021 (LoRA); paper, section 4.0.4.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional
from transformers import BitsAndBytesConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from models.ranker.packing import TREE_ATTENTION, pack
from preprocessing.errors import InputError

disable_progress_bar()

NF4 = "nf4"
UNQUANTISED = "none"


def load_base(folder: Path, *, quantisation: str, dtype: torch.dtype, device: str) -> Any:
    """A frozen base: its linear layers in NF4 with double quantisation, or everything in ``dtype``.

    Args:
        folder: Hugging Face folder.
        quantisation: ``nf4`` or ``none``.
        dtype: precision of the arithmetic, and of what is not quantised.
        device: ``cpu`` or ``cuda``.
    """
    given: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "attn_implementation": TREE_ATTENTION}
    if quantisation == NF4:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        model = LlamaForCausalLM.from_pretrained(
            str(folder), quantization_config=config, device_map={"": device}, **given
        )
    else:
        model = LlamaForCausalLM.from_pretrained(str(folder), **given).to(device)
    return model.requires_grad_(False)


def add_adapters(
    model: Any, *, rank: int, alpha: int, dropout: float, targets: Sequence[str], layers: int | None = None
) -> Any:
    """The base with trainable fp32 adapters on the named projections, ready to train.

    Args:
        model: of :func:`load_base`.
        rank: of the adapters.
        alpha: they are scaled by ``alpha / rank``.
        dropout: on what enters them.
        targets: names of the projections.
        layers: how many of the upper layers get them; all if absent. Nothing below is computed backwards.

    Raises:
        InputError: the base has fewer layers.
    """
    count = model.config.num_hidden_layers
    if layers is not None and layers > count:
        raise InputError(f"adapters on {layers} layers: the base has {count}, ask for no more")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets),
        layers_to_transform=None if layers is None else list(range(count - layers, count)),
        layers_pattern=None if layers is None else "layers",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # peft reads an attribute that transformers renames
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, config).train()


def answer_loss(
    model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, share: bool = True
) -> Tensor:
    """Summed cross-entropy of the answers' tokens behind their prompts, nothing else of the text being learned.

    The prompts are packed (:mod:`models.ranker.packing`); the head is computed at the answers' positions only.

    Args:
        model: of :func:`add_adapters`.
        prompts: token ids.
        answers: token ids, equally many for each prompt: the letter and the end token.
        share: compute what prompts begin with alike only once; the loss is the same.
    """
    llama = model.get_base_model()
    device = llama.lm_head.weight.device
    labels = torch.tensor(answers, device=device)  # [batch, answer]
    width = labels.shape[1]
    # The last token of an answer is only predicted, so nothing is read from behind it.
    packed = pack(
        [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)], device, share=share
    )
    hidden = llama.model(
        input_ids=packed.tokens, position_ids=packed.positions, segments=packed.segments, use_cache=False
    ).last_hidden_state[0]  # [total, hidden]
    # The token at a position is predicted from the position before it.
    places = torch.from_numpy(np.stack([row[-width:] for row in packed.places])).to(device)  # [batch, answer]
    logits = llama.lm_head(hidden[places]).float()  # [batch, answer, vocabulary]
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode, and safely back into training.

    On processors with AVX512-bf16 bitsandbytes 0.50 repacks NF4 weights in place at their first forward pass in
    evaluation mode: until unpacked they dequantise to noise and pass no gradient, and unpacked their scales are
    rounded to bf16, so a model that was evaluated would not be the one that was trained. The 4-bit layers, whose mode
    has no other meaning, therefore stay in training mode.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.training = True
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train()


def letter_logits(model: Any, prompt: Sequence[int], letter_ids: Sequence[int]) -> Tensor:
    """Logits of the letters [letters] behind one prompt, the head's rows in fp32; within :func:`evaluating`."""
    llama = model.get_base_model()
    rows = llama.lm_head.weight[list(letter_ids)].float()  # [letters, hidden]
    tokens = torch.tensor([list(prompt)], device=rows.device)
    hidden = llama.model(input_ids=tokens, use_cache=False).last_hidden_state[0, -1]  # [hidden]
    logits: Tensor = rows @ hidden.float()
    return logits
