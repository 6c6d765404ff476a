"""QLoRA: a frozen 4-bit base with low-rank adapters, its loss on the answer alone, and its letters' logits.

Source: Dettmers et al. 2023 (NF4, double quantisation); Hu et al. 2021 (LoRA); paper, section 4.0.4.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional
from transformers import BitsAndBytesConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

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
    if quantisation == NF4:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        model = LlamaForCausalLM.from_pretrained(
            str(folder), dtype=dtype, quantization_config=config, device_map={"": device}, local_files_only=True
        )
    else:
        model = LlamaForCausalLM.from_pretrained(str(folder), dtype=dtype, local_files_only=True).to(device)
    return model.requires_grad_(False)


def add_adapters(model: Any, *, rank: int, alpha: int, dropout: float, targets: Sequence[str]) -> Any:
    """The base with trainable fp32 adapters on the named projections of every layer, ready to train."""
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():  # peft reads an attribute that transformers renames
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, config).train()


def answer_loss(model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Tensor:
    """Summed cross-entropy of the answers' tokens behind their prompts, nothing else of the text being learned.

    Shorter texts are padded behind their end, where causal attention never looks from before, so no mask is needed;
    the head is computed at the answers' positions only.

    Args:
        model: of :func:`add_adapters`.
        prompts: token ids.
        answers: token ids, equally many for each prompt: the letter and the end token.
    """
    llama = model.get_base_model()
    device = llama.lm_head.weight.device
    texts = [torch.tensor([*prompt, *answer]) for prompt, answer in zip(prompts, answers, strict=True)]
    tokens = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True).to(device)  # [batch, length]
    labels = torch.tensor(answers, device=device)  # [batch, answer]
    # The token at a position is predicted from the position before it.
    starts = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    places = starts[:, None] + torch.arange(labels.shape[1], device=device)  # [batch, answer]
    hidden = llama.model(input_ids=tokens, use_cache=False).last_hidden_state  # [batch, length, hidden]
    at_answers = hidden[torch.arange(len(texts), device=device)[:, None], places]  # [batch, answer, hidden]
    logits = llama.lm_head(at_answers).float()  # [batch, answer, vocabulary]
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
