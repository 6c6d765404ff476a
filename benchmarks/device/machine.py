"""Measures what the machine offers: software, memory, copy rates and the rate of matrix products.

python -m benchmarks.device machine
"""

import ctypes.util
import inspect
import platform
import shutil
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.device.section import MEMORY, Section, section_of
from benchmarks.device.timing import matmul_rate, median_seconds, seconds_of
from models.ranker.precision import DTYPES

PACKAGES = (
    "torch", "transformers", "peft", "bitsandbytes", "accelerate", "numpy", "pandas", "pyarrow", "protobuf", "triton",
    "nvidia-pytriton", "tritonclient",
)  # fmt: skip


def measure(section: Section) -> None:
    """Record versions, the room for files, and the rates of copies and matrix products."""
    section.record("versions", {"python": platform.python_version(), **dict(map(_version, PACKAGES))})
    section.record(
        "programs",
        {
            "gcc": shutil.which("gcc"),
            "libpython": ctypes.util.find_library(f"python{sys.version_info.major}.{sys.version_info.minor}"),
            "tritonserver": shutil.which("tritonserver"),
        },
    )
    section.record("free_bytes", {str(path): shutil.disk_usage(path).free for path in (MEMORY, Path("/tmp"))})
    device, size = section.device, 1 << (22 if section.dry_run else 30)
    section.record("copy_bytes_a_second", copy_rates(device, size))
    section.record("write_bytes_a_second", write_rate(section.work, size))
    side = 256 if section.dry_run else 8192
    names = ("float32",) if section.dry_run else ("bfloat16", "float16", "float32")
    section.record("matmul_flops", {name: matmul_rate(device, DTYPES[name], side) for name in names})
    section.record("varlen_attention", attempt(lambda: varlen_attention(device)))


def _version(package: str) -> tuple[str, str | None]:
    try:
        return package, metadata.version(package)
    except metadata.PackageNotFoundError:
        return package, None


def copy_rates(device: str, size: int) -> dict[str, float]:
    """Return the bytes per second of copies of ``size`` bytes; a copy on the device reads and writes each of them."""
    here = torch.empty(size, dtype=torch.uint8, pin_memory=device != "cpu")
    source, target = (torch.randint(0, 255, (size,), dtype=torch.uint8, device=device) for _ in range(2))
    return {
        "on the device": 2 * size / median_seconds(lambda: target.copy_(source), device, 5),
        "to the device": size / median_seconds(lambda: target.copy_(here), device, 5),
        "from the device": size / median_seconds(lambda: here.copy_(source), device, 5),
    }


def write_rate(folder: Path, size: int) -> float:
    """Return the bytes per second at which a file is written to the folder for weights."""
    folder.mkdir(parents=True, exist_ok=True)
    file, content = folder / "written", bytes(size)
    try:
        return size / seconds_of(lambda: file.write_bytes(content), "cpu")
    finally:
        file.unlink(missing_ok=True)


def varlen_attention(device: str) -> str:
    """Return the largest deviation of packed attention with grouped heads from attention one by one, in fp16."""
    from torch.nn.attention.varlen import varlen_attn  # PyTorch 2.10 or newer
    from torch.nn.functional import scaled_dot_product_attention

    torch.manual_seed(0)
    lengths, heads, key_heads, width = (70, 130), 4, 2, 64
    ends = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32, device=device)
    query = torch.randn(sum(lengths), heads, width, dtype=torch.float16, device=device)
    key, value = (torch.randn(sum(lengths), key_heads, width, dtype=torch.float16, device=device) for _ in range(2))
    # Newer versions of PyTorch want to be told of grouped heads; older ones do not know the argument.
    grouped: Any = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    limits = (max(lengths), max(lengths))
    packed: Any = varlen_attn(query, key, value, ends, ends, *limits, window_size=(-1, 0), **grouped)
    alone = []
    for rows in zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True):
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in rows)  # [1, heads, length, width]
        alone.append(scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return f"{float((packed - torch.cat(alone)).abs().max()):.2g}"


def attempt(run: Callable[[], Any]) -> Any:
    """Return what a call returns, or its error as text: some PyTorch builds and cards lack the operation."""
    try:
        return run()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"


if __name__ == "__main__":
    measure(section_of(__doc__)[0])
