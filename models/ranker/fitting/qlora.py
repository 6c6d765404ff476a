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
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils.logging import disable_progress_bar

from models.ranker.fitting.packing import TREE_ATTENTION, PackedPrompts, pack
from models.ranker.prompt import Prompt
from preprocessing.errors import InputError

disable_progress_bar()

NF4 = "nf4"
UNQUANTISED = "none"


def load_base(folder: Path, *, quantisation: str, dtype: torch.dtype, device: str, depth: int | None = None) -> Any:
    """A frozen base: its linear layers in NF4 with double quantisation, or everything in ``dtype``.

    Args:
        folder: Hugging Face folder.
        quantisation: ``nf4`` or ``none``.
        dtype: precision of the arithmetic, and of what is not quantised.
        device: ``cpu`` or ``cuda``.
        depth: how many of its lower layers are kept; all if absent.

    Raises:
        InputError: the folder lacks weights of its architecture, or has fewer layers.
    """
    given: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "attn_implementation": TREE_ATTENTION}
    if quantisation == NF4:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        given |= {"quantization_config": config, "device_map": {"": device}}
    model, loaded = AutoModelForCausalLM.from_pretrained(str(folder), output_loading_info=True, **given)
    if missing := loaded["missing_keys"]:
        raise InputError(f"base model {folder} lacks weights, {min(missing)} first: download it again")
    if depth is not None:
        _cut(model, depth)
    if quantisation != NF4:
        model = model.to(device)
    return model.requires_grad_(False)


def _cut(model: Any, depth: int) -> None:
    """Leaves the lower layers of a model alone, whose final norm then stands behind the last of them."""
    decoder = model.get_decoder()
    if not hasattr(decoder, "layers"):
        raise InputError(f"{model.config.architectures} keeps its layers elsewhere than Llama: leave depth out")
    if depth > len(decoder.layers):
        raise InputError(f"a depth of {depth} layers: the base has {len(decoder.layers)}, ask for no more")
    decoder.layers = decoder.layers[:depth]
    model.config.num_hidden_layers = depth
    if getattr(model.config, "layer_types", None):  # of Qwen and others: one for each layer
        model.config.layer_types = model.config.layer_types[:depth]


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
        InputError: the base has fewer layers, or no such projections.
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
        try:
            adapted = get_peft_model(model, config).train()
        except ValueError as error:
            raise InputError(f"adapters on {', '.join(targets)}: the base has no such projections ({error})") from None
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            module.lora_variant.update(dict.fromkeys(module.active_adapters, AddedInOneProduct()))
    return adapted


class AddedInOneProduct(LoraVariant):  # type: ignore[misc]  # peft has no types
    """An adapter whose last product adds itself, scaled, to the base's output: what peft computes, in one go.

    On a processor peft's own way, a product, a scaling and a sum, each of which reads and writes the whole output and
    again its gradient, takes longer than the products.
    """

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """See peft's ``LoraVariant``."""
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
    """Summed cross-entropy of the answers' tokens behind their prompts, nothing else of the text being learned.

    The prompts are packed (:mod:`models.ranker.fitting.packing`); the head is computed at the answers' positions only.

    Args:
        model: of :func:`add_adapters`.
        prompts: token ids.
        answers: token ids, equally many for each prompt: the letter and the end token.
        share: compute what prompts begin with alike only once; the loss is the same.
    """
    decoder, head = _decoder_and_head(model)
    device = head.weight.device
    labels = torch.tensor(answers, device=device)  # [batch, answer]
    width = labels.shape[1]
    # The last token of an answer is only predicted, so nothing is read from behind it.
    packed = pack(
        [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)], device, share=share
    )
    # The token at a position is predicted from the position before it.
    places = torch.from_numpy(np.stack([row[-width:] for row in packed.places])).to(device)  # [batch, answer]
    with _mixed_precision(model):
        logits = head(_hidden_states(decoder, packed)[places]).float()  # [batch, answer, vocabulary]
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
    """Summed cross-entropy of the candidate that came next, by what its line says beside the others'.

    Args:
        model: of :func:`add_adapters`.
        direction: [hidden] along which the lines are read.
        prompts: see :class:`models.ranker.prompt.Prompt`.
        truths: place of the true item among each prompt's candidates, from 0.
        scores: logits [k] of each prompt's candidates to which the lines add what they know: the retriever's.
        share: compute what prompts begin with alike only once; the loss is the same.
    """
    decoder, _ = _decoder_and_head(model)
    packed = pack([prompt.tokens for prompt in prompts], direction.device, share=share)
    with _mixed_precision(model):
        hidden = _hidden_states(decoder, packed)
    loss = direction.new_zeros(())
    for prompt, places, truth, known in zip(prompts, packed.places, truths, scores, strict=True):
        ends = torch.from_numpy(places[prompt.line_ends]).to(direction.device)  # [k]
        says = hidden[ends].float() @ direction + known.to(direction.device)
        loss = loss - says.log_softmax(0)[truth]
    return loss


def _hidden_states(decoder: Any, packed: PackedPrompts) -> Tensor:
    """Normalised states behind the last layer [total, hidden]."""
    hidden: Tensor = decoder(
        input_ids=packed.tokens, position_ids=packed.positions, segments=packed.segments, use_cache=False
    ).last_hidden_state[0]
    return hidden


@contextmanager
def _mixed_precision(model: Any) -> Iterator[None]:
    """Adapters, which are kept in fp32, are multiplied in the base's precision, and their gradients are fp32 again."""
    reduced = model.dtype != torch.float32
    autocast = torch.autocast(model.device.type, model.dtype, enabled=reduced)
    with autocast, disable_input_dtype_casting(model, reduced):
        yield


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
    decoder, head = _decoder_and_head(model)
    rows = head.weight[list(letter_ids)].float()  # [letters, hidden]
    tokens = torch.tensor([list(prompt)], device=rows.device)
    hidden = decoder(input_ids=tokens, use_cache=False).last_hidden_state[0, -1]  # [hidden]
    logits: Tensor = rows @ hidden.float()
    return logits


def line_logits(model: Any, direction: Tensor, prompt: Prompt) -> Tensor:
    """What the candidates' lines of one prompt say [k], in fp32; within :func:`evaluating`."""
    decoder, _ = _decoder_and_head(model)
    tokens = torch.tensor([prompt.tokens], device=direction.device)
    hidden = decoder(input_ids=tokens, use_cache=False).last_hidden_state[0]  # [length, hidden]
    logits: Tensor = hidden[prompt.line_ends].float() @ direction
    return logits


def check_architecture(model: Any, letter_ids: Sequence[int], prompt_tokens: int) -> None:
    """Whether this module computes the base rightly, as it does most causal models; takes a moment.

    Args:
        model: of :func:`add_adapters`.
        letter_ids: token id of each letter.
        prompt_tokens: of the longest prompt.

    Raises:
        InputError: the base looks back less far than a prompt, letters read from the last position are not those of
            its own logits, or packed prompts change one another.
    """
    if (window := getattr(model.config, "sliding_window", None)) and window < prompt_tokens:
        raise InputError(
            f"{model.config.architectures} looks back {window} tokens and a prompt may have {prompt_tokens}: lower"
            f" --max-tokens to {window}"
        )
    prompts = [[*letter_ids, *letter_ids], [*letter_ids, *letter_ids[1:], 5], letter_ids[:3]]
    answers = [[letter_ids[0], letter_ids[1]]] * len(prompts)
    with evaluating(model):
        tokens = torch.tensor([prompts[0]], device=model.device)
        own = model(input_ids=tokens, use_cache=False).logits[0, -1, list(letter_ids)].float()
        ours = letter_logits(model, prompts[0], letter_ids)
        alone = sum(float(answer_loss(model, [prompt], answers[:1])) for prompt in prompts)
        packed = float(answer_loss(model, prompts, answers))
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    if float((own - ours).abs().max()) > tolerance * max(1.0, float(own.abs().max())):
        raise InputError(f"{model.config.architectures} changes its head's logits: choose a base such as Llama 2")
    if abs(packed - alone) > tolerance * alone:
        raise InputError(
            f"{model.config.architectures} does not use transformers' attention interface, so prompts cannot be packed:"
            " choose another base, such as Llama 2"
        )


def _decoder_and_head(model: Any) -> tuple[Any, Any]:
    """The layers below the head, and the head."""
    base = model.get_base_model()
    return base.get_decoder(), base.get_output_embeddings()
