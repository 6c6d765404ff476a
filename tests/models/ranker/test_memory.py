"""The memory that a model needs on a GPU, computed without loading it, and the refusal of one that does not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from tiny import tiny_base

from models.ranker.fitting import qlora
from models.ranker.inference import torch_scorer
from models.ranker.inference.scorer import Runtime
from models.ranker.memory import PROMPT_TOKENS, empty_model, serving_bytes, training_bytes
from models.ranker.precision import DTYPES
from preprocessing.errors import InputError

GPU = "cuda:1"
WIDEST = 512
TOTAL = 8 << 30


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Llama whose layers have whole blocks of NF4's scales: all sizes are multiples of 64 x 256 weights."""
    return tiny_base(
        tmp_path_factory.mktemp("base"),
        tie_word_embeddings=request.param,
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=WIDEST,
    )


def held(model: torch.nn.Module) -> int:
    """Return the bytes of a loaded model's parameters, and of the scales of those in NF4."""
    total = 0
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            total += parameter.numel() * parameter.element_size()
            if isinstance(module, Linear4bit):
                state = parameter.quant_state
                scales = (state.absmax, state.state2.absmax)
                total += sum(scale.numel() * scale.element_size() for scale in scales)
    head = model.get_output_embeddings().weight  # type: ignore[operator]
    if head is model.get_input_embeddings().weight:  # type: ignore[operator]
        total -= head.numel() * head.element_size()  # met twice
    return total


@pytest.mark.parametrize(("quantisation", "dtype"), [("none", "float32"), ("none", "float16"), ("nf4", "bfloat16")])
def test_the_bytes_of_a_training_are_those_of_the_loaded_base(base: Path, quantisation: str, dtype: str):
    """The count without data equals what the loaded base holds; a tied head is counted once."""
    model = qlora.load_base(base, quantisation=quantisation, dtype=DTYPES[dtype], device="cpu")
    assert any(isinstance(module, Linear4bit) for module in model.modules()) == (quantisation == "nf4")
    assert training_bytes(empty_model(base), DTYPES[dtype], nf4=quantisation == "nf4") == held(model)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_bytes_of_serving_are_those_of_the_layers_and_one_prompt(base: Path, dtype: str):
    """The scorer's layers hold the count less the activations: four tensors of the prompt's length and 512 wide."""
    scorer = torch_scorer.TorchScorer(base, Runtime(dtype="float32"))
    layers = scorer._layers.to(DTYPES[dtype])
    loaded = sum(parameter.numel() * parameter.element_size() for parameter in layers.parameters())
    activations = 4 * PROMPT_TOKENS * WIDEST * DTYPES[dtype].itemsize
    assert serving_bytes(base, DTYPES[dtype]) == loaded + activations
    matrices = sum(module.weight.numel() for module in layers.modules() if isinstance(module, torch.nn.Linear))
    in_fp8 = loaded + activations - (DTYPES[dtype].itemsize - 1) * matrices
    assert serving_bytes(base, DTYPES[dtype], matrix_bytes=1) == in_fp8


class LoadingError(Exception):
    """Raised in place of loading a model."""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """Return a function that makes PyTorch report the free memory of a GPU; loading a model raises LoadingError."""

    def loads(*args: Any, **kwargs: Any) -> None:
        raise LoadingError

    def report(free: int) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", {GPU: (free, TOTAL)}.__getitem__)

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", loads)
    return report


def test_serving_needs_all_of_the_memory(base: Path, gpu):
    """With as many free bytes as the model needs it is loaded; with one less, the error names both and the remedy."""
    runtime = Runtime(dtype="float16", device=GPU)
    needed = serving_bytes(base, torch.float16)
    gpu(needed)
    with pytest.raises(LoadingError):
        torch_scorer.TorchScorer(base, runtime)
    gpu(needed - 1)
    sizes = rf"{-(-needed // 2**20)} MiB of GPU memory, and {(needed - 1) // 2**20} of 8,192 MiB are free on {GPU}"
    with pytest.raises(InputError, match=rf"{base} needs at least {sizes}: .* export with --device cpu"):
        torch_scorer.TorchScorer(base, runtime)


@pytest.mark.parametrize(("quantisation", "quantise"), [("nf4", False), ("none", True)])
def test_training_needs_all_of_the_memory(base: Path, gpu, quantisation: str, quantise: bool):
    """NF4 is a remedy only for a base that is not quantised yet."""
    given = {"quantisation": quantisation, "dtype": torch.bfloat16, "device": GPU}
    needed = training_bytes(empty_model(base), torch.bfloat16, nf4=quantisation == "nf4")
    gpu(needed)
    with pytest.raises(LoadingError):
        qlora.load_base(base, **given)
    gpu(needed - 1)
    with pytest.raises(InputError, match=r"MiB of GPU memory, .* use --device cpu") as error:
        qlora.load_base(base, **given)
    assert ("quantisation" in str(error.value)) == quantise


def test_layers_that_are_cut_off_take_no_memory(base: Path, gpu):
    """A base that is cut before it is moved needs the memory of its lower layer; in NF4 it is moved first."""
    whole, lower = empty_model(base), empty_model(base)
    del qlora.layers_of(lower)[1:]
    layer = sum(parameter.numel() for parameter in whole.get_decoder().layers[1].parameters())
    needed = training_bytes(lower, torch.float32, nf4=False)
    assert needed == training_bytes(whole, torch.float32, nf4=False) - 4 * layer
    gpu(needed)
    with pytest.raises(LoadingError):
        qlora.load_base(base, quantisation="none", dtype=torch.float32, device=GPU, depth=1)
    gpu(training_bytes(whole, torch.float32, nf4=True) - 1)
    with pytest.raises(InputError, match="needs at least"):
        qlora.load_base(base, quantisation="nf4", dtype=torch.float32, device=GPU, depth=1)
