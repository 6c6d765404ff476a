"""Checks a base model before anything is trained.

Packed prompts must give the hidden states that the architecture computes with its own attention, and adapters must
merge into weights that it has. A model of 7B does not fit into memory in fp32, and in bf16 rounding would hide small
differences, so both are tried in fp32 on the first layer of each kind, at its real width.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from models.device import torch_device
from models.ranker.fitting.merge import merged_tensors
from models.ranker.fitting.objective import end_token
from models.ranker.fitting.packing import TREE_ATTENTION, PackedPrompts, pack
from models.ranker.fitting.qlora import add_adapters, cut_config, hidden_states, layers_of, load_base
from models.ranker.options import RankerTraining
from models.ranker.precision import DTYPES, has_native_bf16
from models.ranker.prompt import Prompt
from preprocessing.errors import InputError

TOLERANCE = 1e-3
"""Largest difference between two computations of a hidden state, relative to its norm. In fp32 rounding makes 1e-5."""
SHORT = 64
"""Number of tokens on which head and merged weights are checked, which do not depend on the length of a prompt."""
TRIED_ADAPTERS = 0.02
"""Standard deviation of the adapters' second matrices in the check; new ones are zero and would change nothing."""


def load_checked(
    options: RankerTraining, folder: Path, tokenizer: Tokenizer, prompts: Sequence[Prompt], letter_ids: Sequence[int]
) -> Any:
    """Return the base of :func:`models.ranker.fitting.qlora.load_base` after all checks; no random number is drawn.

    Args:
        options: see :class:`RankerTraining`; their number of threads is set for the whole process.
        folder: folder of the base model.
        tokenizer: the base's tokenizer.
        prompts: prompts to compute, some with common prefixes.
        letter_ids: token id of each letter.

    Raises:
        InputError: the ranker cannot be trained from this base, or not with these options.
    """
    check_config(options, folder, tokenizer)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch_device(options.device)
    dtype = ("bfloat16" if has_native_bf16(device) else "float32") if options.dtype == "auto" else options.dtype
    model = load_base(
        folder, quantisation=options.quantisation, dtype=DTYPES[dtype], device=device, depth=options.depth
    )
    check_layers(model, options, prompts, letter_ids)
    return model


def check_config(options: RankerTraining, folder: Path, tokenizer: Tokenizer) -> None:
    """Check what does not need the base's weights: architecture, tokenizer, end token and length of context.

    Raises:
        InputError: see :func:`load_checked`.
    """
    config = _read_config(folder)
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if architecture is None or architecture.__name__ not in config.architectures:
        raise InputError(
            f"base model {folder} names the architecture {', '.join(config.architectures)}, which transformers"
            f" {transformers.__version__} does not have for {config.model_type}; a base's own Python code is never run:"
            " choose another base, such as Llama 2"
        )
    if not architecture._supports_attention_backend:
        raise InputError(
            f"{architecture.__name__} does not use transformers' attention interface, so prompts cannot be packed:"
            " choose a base such as Llama 2"
        )
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    largest = max(*set(tokenizer.get_vocab().values()) - special, *tokenizer.encode("").ids)
    if largest >= config.vocab_size:
        raise InputError(
            f"the tokenizer of base model {folder} has token ids up to {largest}, but the model has {config.vocab_size}"
            " embeddings: take tokenizer.json and weights from the same model"
        )
    if options.read == "letters" and end_token(config) is None:
        raise InputError(
            f"{folder / 'config.json'} has no eos_token_id, which the training on letters needs: set it to the token"
            " that ends a text, or use --read lines"
        )
    _check_length(options, config, architecture.__name__)


def _read_config(folder: Path) -> Any:
    """Return the base's configuration; unlike transformers, never ask whether to run the base's own code."""
    path = folder / "config.json"
    try:
        settings = PreTrainedConfig.get_config_dict(str(folder))[0]
        kind = settings.get("model_type")
        config = CONFIG_MAPPING[kind].from_pretrained(str(folder)) if kind in CONFIG_MAPPING else None
    except Exception as error:  # each configuration checks its values in its own way
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{path} is not a configuration that transformers reads ({cause}): download it again"
        ) from None
    if config is None:
        code = ", and the Python code that it brings is never run" if "auto_map" in settings else ""
        raise InputError(
            f"{path} has the model_type {kind!r}, which transformers {transformers.__version__} does not have{code}:"
            " choose another base, such as Llama 2"
        )
    return config


def _check_length(options: RankerTraining, config: Any, architecture: str) -> None:
    longest, context = options.max_tokens, getattr(config, "max_position_embeddings", None)
    if context is not None and longest + 1 > context:
        raise InputError(
            f"max_tokens {longest} and the letter exceed the base's context of {context}: lower --max-tokens to"
            f" {context - 1} or less; prompts then drop their oldest history items"
        )
    window = getattr(config, "sliding_window", None)
    if window and window < longest:
        raise InputError(
            f"{architecture} attends to {window} tokens and a prompt may have {longest}: lower --max-tokens to {window}"
        )


def check_layers(model: Any, options: RankerTraining, prompts: Sequence[Prompt], letter_ids: Sequence[int]) -> None:
    """Check in fp32 that packing, head and merging compute what the base's first layers of each kind do.

    Args:
        model: a model of :func:`models.ranker.fitting.qlora.load_base`.
        options: see :class:`RankerTraining`.
        prompts: prompts to compute, some with common prefixes.
        letter_ids: token id of each letter.

    Raises:
        InputError: see :func:`load_checked`.
    """
    name, device = type(model).__name__, model.device
    tokens = [prompt.tokens for prompt in prompts]
    packed, short = pack(tokens, device), tokens[0][-SHORT:]
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        layers = first_layers(model)
        if not _agree(_states_packed(layers, packed), _states_alone(layers, tokens)):
            raise InputError(
                f"{name} computes attention in its own way, which packed prompts do not: choose a base such as Llama 2"
            )
        if options.read == "letters" and not _head_is_a_product(layers, short, letter_ids):
            raise InputError(
                f"{name} adds a scale, a cap or a bias to its head's logits: use --read lines, or choose a base such as"
                " Llama 2"
            )
        merged = copy.deepcopy(layers)
        adapted = add_adapters(layers, rank=options.rank, alpha=options.alpha, dropout=0.0, targets=options.targets)
        for parameter_name, parameter in adapted.eval().named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(std=TRIED_ADAPTERS)
        fits = _fill(merged, dict(merged_tensors(adapted, torch.float32)))
        if not fits or not _agree(_states_alone(layers, [short]), _states_alone(merged, [short])):
            raise InputError(
                f"adapters on {', '.join(options.targets)} cannot be merged into {name}: choose other --targets, or a"
                " base such as Llama 2"
            )


def first_layers(model: Any) -> Any:
    """Return a copy of a model in fp32, dequantised, with only the first of its layers of each kind."""
    layers = layers_of(model)
    kinds: dict[str, int] = {}
    for place, layer in enumerate(layers):
        kinds.setdefault(_kind(layer), place)
    copied: dict[int, Any] = {}  # what deepcopy has copied; the chosen layers stand for the whole list
    copied[id(layers)] = nn.ModuleList([copy.deepcopy(layers[place], copied) for place in kinds.values()])
    small = copy.deepcopy(model, copied)
    cut_config(small.config, list(kinds.values()))
    for name, module in list(small.named_modules()):
        if isinstance(module, Linear4bit):
            small.set_submodule(name, _dequantised(module))
    for tensor in (*small.parameters(), *small.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    return small


def _kind(layer: nn.Module) -> str:
    """Return what distinguishes a layer from those of another kind: its modules, their settings and shapes."""
    settings = [
        (
            name,
            type(module).__name__,
            sorted((key, value) for key, value in vars(module).items() if _is_setting(key, value)),
        )
        for name, module in layer.named_modules()
    ]
    return repr((settings, [(name, tuple(weight.shape)) for name, weight in layer.named_parameters()]))


def _is_setting(key: str, value: object) -> bool:
    return isinstance(value, int | float | str | None) and not key.endswith("idx")


def _dequantised(layer: Linear4bit) -> nn.Linear:
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(dequantize_4bit(layer.weight.data, layer.weight.quant_state), requires_grad=False)
    plain.bias = layer.bias
    return plain


def _states_alone(model: Any, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return each prompt's hidden states [length, hidden], computed alone with the architecture's own attention."""
    _set_attention(model, model.get_correct_attn_implementation(None))
    decoder = model.get_decoder()
    alone = (torch.tensor([list(prompt)], device=model.device) for prompt in prompts)
    return [decoder(input_ids=tokens, use_cache=False).last_hidden_state[0] for tokens in alone]


def _states_packed(model: Any, packed: PackedPrompts) -> list[Tensor]:
    """Return each prompt's hidden states [length, hidden], computed in one pass over the packed prompts."""
    _set_attention(model, TREE_ATTENTION)
    states = hidden_states(model.get_decoder(), packed)  # [total, hidden]
    return [states[torch.from_numpy(places).to(states.device)] for places in packed.places]


def _set_attention(model: Any, name: str) -> None:
    for module in model.modules():
        if isinstance(config := getattr(module, "config", None), PreTrainedConfig):
            config._attn_implementation = name


def _agree(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    differences = [(ours - own).norm(dim=-1) / own.norm(dim=-1) for ours, own in zip(found, expected, strict=True)]
    return bool(torch.cat(differences).max() <= TOLERANCE)


def _head_is_a_product(model: Any, prompt: Sequence[int], letter_ids: Sequence[int]) -> bool:
    """Return whether the letters' logits are the product of the last hidden state and the head's rows."""
    tokens = torch.tensor([list(prompt)], device=model.device)
    own = model(input_ids=tokens, use_cache=False).logits[0, -1, list(letter_ids)]
    hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state[0, -1]  # [hidden]
    ours = model.get_output_embeddings().weight[list(letter_ids)] @ hidden
    return bool((ours - own).norm() <= TOLERANCE * own.norm())


def _fill(model: Any, weights: Mapping[str, Tensor]) -> bool:
    """Load weights into a model; return whether they are exactly the ones that it has."""
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    try:
        loaded = model.load_state_dict(weights, strict=False)
    except RuntimeError:  # another shape
        return False
    return not loaded.unexpected_keys and not set(loaded.missing_keys) - tied
