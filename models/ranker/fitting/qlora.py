"""QLoRA: loads a frozen 4-bit base, adds low-rank adapters, and computes the losses and logits of the two verbalizers.

Source: Dettmers et al. 2023 (NF4, double quantisation); Hu et al. 2021 (LoRA); paper, section 4.0.4.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn
from torch.nn import functional
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from models.device import sent
from models.ranker.fitting.packing import TREE_ATTENTION, PackedPrompts, pack
from models.ranker.loading import load_causal_lm
from models.ranker.memory import check_gpu_memory, empty_model, training_bytes
from models.ranker.prompt import Prompt
from preprocessing.errors import InputError

NF4 = "nf4"
UNQUANTISED = "none"
_QUERY_KEY_VALUE = ("qkv_proj", "query_key_value", "c_attn")
_UP = ("gate_up_proj", "fc1", "dense_h_to_4h", "c_fc")
COUNTERPARTS: Mapping[str, Sequence[str]] = {
    "q_proj": _QUERY_KEY_VALUE,
    "k_proj": _QUERY_KEY_VALUE,
    "v_proj": _QUERY_KEY_VALUE,
    "o_proj": ("out_proj", "dense", "attn.c_proj"),
    "gate_proj": _UP,
    "up_proj": _UP,
    "down_proj": ("fc2", "dense_4h_to_h", "mlp.c_proj"),
}
"""Other names of Llama's projections: fused ones (Phi-3, GPT-NeoX, GPT-2), and those of OPT, Phi and GPT-2."""
LAYERS = ("layers", "h")
"""Names of the list of layers in a decoder; the second is GPT-2's."""


def load_base(folder: Path, *, quantisation: str, dtype: torch.dtype, device: str, depth: int | None = None) -> Any:
    """Return a frozen base, with its linear layers in NF4 with double quantisation, or entirely in ``dtype``.

    Args:
        folder: the base's Hugging Face folder.
        quantisation: ``nf4`` or ``none``.
        dtype: precision of the arithmetic and of the weights that are not quantised.
        device: PyTorch's name of the device.
        depth: maximum number of lower layers that are kept; all if absent.

    Raises:
        InputError: the folder's weights are not those of its architecture, or the GPU has too little free memory, in
            which case nothing is loaded.
    """
    if device != "cpu":
        _check_memory(folder, quantisation, dtype, device, depth)
    given: dict[str, Any] = {"dtype": dtype, "attn_implementation": TREE_ATTENTION}
    if quantisation == NF4:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        given |= {"quantization_config": config, "device_map": {"": device}}
    model = load_causal_lm(folder, "download the base again, or choose another one", **given)
    if depth is not None:
        layers = layers_of(model)
        del layers[depth:]  # the final norm then follows the last layer that is kept
        cut_config(model.config, range(len(layers)))
    if quantisation != NF4:
        model = model.to(device)
    return model.requires_grad_(False)


def _check_memory(folder: Path, quantisation: str, dtype: torch.dtype, device: str, depth: int | None) -> None:
    model = empty_model(folder)
    nf4 = quantisation == NF4
    if depth is not None and not nf4:  # a quantised base is on the GPU before it is cut
        del layers_of(model)[depth:]
    quantise = "" if nf4 else "set quantisation to nf4 (as --preset paper does), "
    remedy = f"use --device cpu, {quantise}or choose a smaller base"
    check_gpu_memory(folder, training_bytes(model, dtype, nf4=nf4), device, remedy)


def layers_of(model: Any) -> nn.ModuleList:
    """Return a model's list of layers.

    Raises:
        InputError: the model keeps its layers elsewhere than the architectures that are known.
    """
    decoder = model.get_decoder()
    name = next((name for name in LAYERS if isinstance(getattr(decoder, name, None), nn.ModuleList)), None)
    if name is None:
        raise InputError(f"{type(model).__name__} has no list of layers: choose a base such as Llama 2")
    layers: nn.ModuleList = getattr(decoder, name)
    return layers


def cut_config(config: Any, kept: Sequence[int]) -> None:
    """Make a configuration that of a model with only these layers, which are given by their places."""
    config.num_hidden_layers = len(kept)
    if kinds := getattr(config, "layer_types", None):  # Qwen and others have one entry per layer
        config.layer_types = [kinds[place] for place in kept]


def find_targets(model: Any, targets: Sequence[str]) -> list[str]:
    """Return the names that the base itself has for these projections, each once.

    Args:
        model: a model of :func:`load_base`.
        targets: the base's own names or Llama's, see :data:`COUNTERPARTS`.

    Raises:
        InputError: one of them is no linear layer of the base, or its experts, which are stacked into one tensor, have
            it too.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    stacked = {name.rsplit(".", 1)[-1] for name, weight in model.named_parameters() if weight.ndim == 3}
    found, absent = [], []
    for target in targets:
        names = (target, *COUNTERPARTS.get(target, ()))
        own = next((name for name in names if _named(linear, name)), None)
        if own is None or stacked.intersection(names):
            absent.append(target)
        else:
            found.append(own)
    if absent:
        others = sorted({name.rsplit(".", 1)[-1] for name in linear if "." in name} - stacked - set(absent))
        raise InputError(
            f"{type(model).__name__} has no linear layers for adapters on {', '.join(absent)}: choose --targets among"
            f" {', '.join(others)}"
        )
    return list(dict.fromkeys(found))


def _named(modules: Sequence[str], name: str) -> bool:
    return any(module.endswith(f".{name}") for module in modules)


def add_adapters(
    model: Any, *, rank: int, alpha: int, dropout: float, targets: Sequence[str], layers: int | None = None
) -> Any:
    """Return the base with trainable fp32 adapters on the named projections, in training mode.

    Args:
        model: a model of :func:`load_base`.
        rank: rank of the adapters.
        alpha: numerator of the adapters' scale ``alpha / rank``.
        dropout: dropout probability of an adapter's input.
        targets: names of the projections, see :func:`find_targets`.
        layers: number of upper layers that get adapters; all if absent. The layers below need no backward pass.

    Raises:
        InputError: the base has fewer than ``layers`` layers, or a projection has no linear layer.
    """
    count = model.config.num_hidden_layers
    if layers is not None and layers > count:
        raise InputError(f"layers is {layers}, but the base has {count} layers: lower layers")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=find_targets(model, targets),
        layers_to_transform=None if layers is None else list(range(count - layers, count)),
        layers_pattern=None if layers is None else list(LAYERS),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads an attribute that transformers has renamed
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # peft sets it itself for GPT-2's transposed weights
        adapted = get_peft_model(model, config).train()
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            module.lora_variant.update(dict.fromkeys(module.active_adapters, AddedInOneProduct()))
    return adapted


class AddedInOneProduct(LoraVariant):  # type: ignore[misc]  # peft has no types
    """An adapter that computes its last product, its scaling and the sum with the base's output in one operation.

    The result is peft's. On a processor, peft's separate operations each read and write the whole output and, backward,
    its gradient, which takes longer than the products.
    """

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Return the base's output ``result`` plus the adapter's; see peft's ``LoraVariant``."""
        lowered = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))  # [..., rank]
        raised = module.lora_B[active_adapter].weight.T  # [rank, out]
        scaling = module.scaling[active_adapter]
        output = result.to(lowered.dtype)  # without autocast the adapters are fp32, and so is the sum
        added = torch.addmm(output.flatten(0, -2), lowered.flatten(0, -2), raised, alpha=scaling)
        whole: Tensor = added.unflatten(0, result.shape[:-1])
        return whole


def answer_loss(
    model: Any,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    share: bool = True,
) -> Tensor:
    """Return the cross-entropy of the answers' tokens after their prompts, summed; prompt tokens have no loss.

    The prompts are packed (:mod:`models.ranker.fitting.packing`); the head is computed at the answers' positions only.

    Args:
        model: a model of :func:`add_adapters`.
        prompts: token ids of each prompt.
        answers: token ids of each prompt's answer, all of the same length: the letter and the end token.
        share: whether common prefixes are computed only once; the loss is the same.
    """
    decoder, head = decoder_and_head(model)
    device = head.weight.device
    labels = sent(torch.tensor(answers), device)  # [batch, answer]
    width = labels.shape[1]
    # The last token of an answer is predicted but predicts nothing, so it is not part of the input.
    packed = pack(
        [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)], device, share=share
    )
    # The token at a position is predicted from the position before it.
    places = sent(torch.from_numpy(np.stack([row[-width:] for row in packed.places])), device)  # [batch, answer]
    with _mixed_precision(model):
        logits = head(hidden_states(decoder, packed)[places]).float()  # [batch, answer, vocabulary]
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def line_loss(
    model: Any,
    direction: Tensor,
    prompts: Sequence[Prompt],
    truths: Sequence[int],
    scores: Sequence[Tensor],
    *,
    share: bool = True,
) -> Tensor:
    """Return the summed cross-entropy of the true items under the sum of the lines' logits and ``scores``.

    Args:
        model: a model of :func:`add_adapters`.
        direction: direction [hidden] onto which the lines' hidden states are projected.
        prompts: see :class:`models.ranker.prompt.Prompt`.
        truths: position (from 0) of the true item among each prompt's candidates.
        scores: the retriever's logits [k] of each prompt's candidates, which the lines' logits correct.
        share: whether common prefixes are computed only once; the loss is the same.
    """
    decoder, _ = decoder_and_head(model)
    packed, ends = pack_lines(prompts, direction.device, share=share)
    with _mixed_precision(model):
        hidden = hidden_states(decoder, packed)
    loss = direction.new_zeros(())
    for places, truth, prior in zip(ends, truths, scores, strict=True):
        logits = hidden[places].float() @ direction + sent(prior, direction.device)  # [k]
        loss = loss - logits.log_softmax(0)[truth]
    return loss


def pack_lines(
    prompts: Sequence[Prompt], device: torch.device, *, share: bool = True
) -> tuple[PackedPrompts, list[Tensor]]:
    """Return prompts packed into one sequence, and the place in it of each candidate's line end, [k] for each prompt.

    Each independent line is a sequence of its own that continues the prefix.
    """
    sequences: list[list[int]] = []
    read: list[list[tuple[int, int]]] = []  # sequence and place in it of each line end
    for prompt in prompts:
        if prompt.prefix:
            own = [[*prompt.tokens[: prompt.prefix], *line] for line in prompt.lines()]
            read.append([(len(sequences) + number, -1) for number in range(len(own))])
            sequences += own
        else:
            read.append([(len(sequences), end) for end in prompt.line_ends])
            sequences.append(prompt.tokens)
    packed = pack(sequences, device, share=share)
    ends = [sent(torch.tensor([packed.places[row][place] for row, place in pairs]), device) for pairs in read]
    return packed, ends


def hidden_states(decoder: Any, packed: PackedPrompts) -> Tensor:
    """Return the normalised hidden states after the last layer [total, hidden]."""
    hidden: Tensor = decoder(
        input_ids=packed.tokens, position_ids=packed.positions, packed=packed, use_cache=False
    ).last_hidden_state[0]
    return hidden


@contextmanager
def _mixed_precision(model: Any) -> Iterator[None]:
    """Multiply the fp32 adapters in the base's precision within the block; their gradients are fp32."""
    reduced = model.dtype != torch.float32
    autocast = torch.autocast(model.device.type, model.dtype, enabled=reduced)
    with autocast, disable_input_dtype_casting(model, reduced):
        yield


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put the model into evaluation mode within the block, and back into training mode after it.

    On processors with AVX512-bf16, bitsandbytes 0.50 repacks NF4 weights in place at their first forward pass in
    evaluation mode. Packed, they dequantise to noise and pass no gradient; unpacked again, their scales are rounded to
    bf16, so an evaluated model would differ from the trained one. The 4-bit layers therefore stay in training mode,
    which has no other effect on them.
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
    """Return the logits of the letters after one prompt [letters], in fp32; call it within :func:`evaluating`."""
    decoder, head = decoder_and_head(model)
    rows = head.weight[list(letter_ids)].float()  # [letters, hidden]
    tokens = torch.tensor([list(prompt)], device=rows.device)
    hidden = decoder(input_ids=tokens, use_cache=False).last_hidden_state[0, -1]  # [hidden]
    logits: Tensor = rows @ hidden.float()
    return logits


def line_logits(model: Any, direction: Tensor, prompt: Prompt) -> Tensor:
    """Return the logits of one prompt's candidates by their lines [k], in fp32; call it within :func:`evaluating`."""
    decoder, _ = decoder_and_head(model)
    if prompt.prefix:
        packed, (ends,) = pack_lines([prompt], direction.device)
        states = hidden_states(decoder, packed)[ends]
    else:
        tokens = torch.tensor([prompt.tokens], device=direction.device)
        states = decoder(input_ids=tokens, use_cache=False).last_hidden_state[0, prompt.line_ends]
    logits: Tensor = states.float() @ direction  # [k]
    return logits


def packed_letter_logits(model: Any, prompts: Sequence[Sequence[int]], letter_ids: Sequence[int]) -> Tensor:
    """Return the logits of the letters after each prompt [prompts, letters]; see :func:`letter_logits`."""
    decoder, head = decoder_and_head(model)
    rows = head.weight[list(letter_ids)].float()  # [letters, hidden]
    packed = pack(prompts, rows.device)
    last = sent(torch.tensor([places[-1] for places in packed.places]), rows.device)
    logits: Tensor = hidden_states(decoder, packed)[last].float() @ rows.T
    return logits


def packed_line_logits(model: Any, direction: Tensor, prompts: Sequence[Prompt]) -> list[Tensor]:
    """Return the logits of each prompt's candidates by their lines [k]; see :func:`line_logits`."""
    decoder, _ = decoder_and_head(model)
    packed, ends = pack_lines(prompts, direction.device)
    hidden = hidden_states(decoder, packed)
    return [hidden[places].float() @ direction for places in ends]


def decoder_and_head(model: Any) -> tuple[Any, Any]:
    """Return the layers below the head, and the head."""
    base = model.get_base_model()
    return base.get_decoder(), base.get_output_embeddings()
