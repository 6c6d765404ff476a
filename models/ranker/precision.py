"""The precisions that a ranker computes in, and which of them a device supports natively."""

import torch

from models.device import processor_has_bf16

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8": torch.bfloat16,
}
"""PyTorch's type of each precision; of ``float8``, that of all but the products with the layers' matrices."""


def has_native_bf16(device: str) -> bool:
    """Return whether the device multiplies bf16 in hardware; emulated bf16 is slower than fp32."""
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return processor_has_bf16()
