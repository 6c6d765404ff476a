"""Products in fp8 (E4M3): a weight matrix takes a byte an element, and each row of the states is rounded as it comes.

Every row has a scale of its own, of the weights as of the states. So what shares a pass with a row does not change how
it is rounded. All else is computed in bf16.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.ranker.forward.shape import ForwardShape
from preprocessing.errors import InputError

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
SMALLEST_SCALE = 1e-12
"""Scale of a row of zeros, which any scale leaves zeros."""
MULTIPLE = 16
"""What both sizes of a weight matrix must be multiples of, on a GPU."""
CAPABILITY = (8, 9)
"""First compute capability of GPUs that multiply fp8."""


@dataclass(frozen=True)
class Float8:
    """A matrix in fp8, whose rows are multiplied with their scales."""

    values: Tensor
    """The rows, divided by their scales [rows, columns]."""
    scales: Tensor
    """A scale for each row, in fp32 [rows, 1]."""


def to_float8(rows: Tensor) -> Float8:
    """Return the nearest matrix in fp8 whose rows' largest magnitudes are the largest that fp8 has."""
    largest = torch.linalg.vector_norm(rows, torch.inf, dim=1, keepdim=True, dtype=torch.float32)
    scales = (largest / LARGEST).clamp_(min=SMALLEST_SCALE)
    return Float8((rows / scales).to(E4M3), scales)


def product(x: Tensor, weight: Float8, bias: Tensor | None) -> Tensor:
    """Return the product of x [rows, in], rounded to fp8, with a weight matrix [out, in], in x's precision [rows, out].

    Sums are kept in fp32, without the shorter accumulation that the GPU offers for fp8.
    """
    given = to_float8(x)
    return torch._scaled_mm(
        given.values,
        weight.values.t(),
        scale_a=given.scales,
        scale_b=weight.scales.t(),
        bias=bias,
        out_dtype=x.dtype,
        use_fast_accum=False,
    )


def check_float8(device: torch.device, shape: ForwardShape) -> None:
    """Check that a device multiplies the matrices of a model in fp8. A processor does, slowly.

    Args:
        device: the device.
        shape: the model's shape.

    Raises:
        InputError: the GPU is too old, or a size is no multiple of 16.
    """
    if device.type != "cuda":
        return
    if (capability := torch.cuda.get_device_capability(device)) < CAPABILITY:
        found, needed = (".".join(map(str, numbers)) for numbers in (capability, CAPABILITY))
        raise InputError(
            f"fp8 needs a GPU of compute capability {needed} or newer, and this one has {found}: use --dtype float16"
        )
    for size in (shape.hidden, shape.inner, shape.heads * shape.width, shape.fused_heads * shape.width):
        if size % MULTIPLE:
            raise InputError(
                f"fp8 needs layers whose sizes are multiples of {MULTIPLE}, and one is {size}: use --dtype float16"
            )
