"""Products in fp8: compared with the products of what the rounded matrices stand for, and with fp32."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig

from models.ranker.forward.float8 import Float8, check_float8, product, to_float8
from models.ranker.forward.shape import shape_of
from preprocessing.errors import InputError

GPU = torch.device("cuda:0")
SHAPE = shape_of(LlamaConfig())


def meant(matrix: Float8) -> torch.Tensor:
    """Return the matrix that the values and scales stand for, in fp32."""
    return matrix.values.float() * matrix.scales


def test_every_row_is_rounded_by_itself():
    """E4M3 has three bits after the leading one: a value moves by at most 1/16 of itself, or by half of the smallest
    step, 2**-9, times the row's scale. Rows of other magnitudes, and of zeros, change nothing.
    """
    rows = torch.randn(4, 64) * torch.tensor([[1.0], [1000.0], [0.001], [0.0]])
    found = to_float8(rows)
    allowed = torch.maximum(rows.abs() / 16, found.scales * 2**-10)
    assert ((meant(found) - rows).abs() <= allowed * 1.001).all()
    assert meant(found).abs().amax(1) == pytest.approx(rows.abs().amax(1))
    for number, row in enumerate(rows):
        assert torch.equal(to_float8(row[None]).values.float()[0], found.values[number].float())


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_product_is_that_of_the_rounded_matrices(with_bias: bool):
    """Up to the bf16 of the result, which has a relative step of 2**-8."""
    x, weight = torch.randn(7, 64, dtype=torch.bfloat16), to_float8(torch.randn(48, 64, dtype=torch.bfloat16))
    bias = torch.randn(48, dtype=torch.bfloat16) if with_bias else None
    found = product(x, weight, bias)
    expected = F.linear(meant(to_float8(x)), meant(weight), None if bias is None else bias.float())
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() <= 2**-7 * expected.abs().max()


def test_a_gpu_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch):
    """An A100 has capability 8.0; Ada's and Hopper's GPUs multiply fp8. A processor computes it as well."""
    check_float8(torch.device("cpu"), SHAPE)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(InputError, match=r"capability 8\.9 or newer, and this one has 8\.0: use --dtype float16"):
        check_float8(GPU, SHAPE)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_float8(GPU, SHAPE)


def test_sizes_that_the_kernels_do_not_take_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(InputError, match="sizes are multiples of 16, and one is 100: use --dtype float16"):
        check_float8(GPU, dataclasses.replace(SHAPE, inner=100))
