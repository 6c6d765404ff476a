"""The device that a model is trained on or served from, as the command line names it."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preprocessing.errors import InputError

DRIVER = Path("/proc/driver/nvidia/version")
"""Exists where an NVIDIA driver is loaded."""


def torch_device(name: str) -> str:
    """Return PyTorch's name of a device, ``cpu`` or ``cuda:N``, after checking that this machine has it.

    Args:
        name: ``auto`` (the first GPU, or the processor where there is none), ``cpu``, ``gpu`` or ``gpu:N``; ``cuda``
            is another word for ``gpu``.

    Raises:
        InputError: the name is not one of these, or PyTorch cannot use such a GPU here; names the remedy.
    """
    match = re.fullmatch(r"auto|cpu|(?:gpu|cuda)(?::(\d+))?", name)
    if match is None:
        raise InputError(f"there is no device {name!r}: choose auto, cpu, gpu or gpu:N")
    if name == "cpu":
        return "cpu"
    import torch  # takes seconds to import, and a processor needs no look at the GPUs

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda:0" if count else "cpu"
    number = int(match[1] or 0)
    if number >= count:
        raise InputError(f"device {name} cannot be used: {_why_not(count, torch.version.cuda)}, or choose cpu")
    return f"cuda:{number}"


def _why_not(count: int, cuda: str | None) -> str:
    """Return why there are only ``count`` GPUs for a PyTorch built with this version of CUDA, and the remedy."""
    if count:
        return f"this machine has {count} GPUs, numbered from 0: choose one of them"
    if cuda is None:
        return "this PyTorch is a build without CUDA: install a CUDA build"
    if DRIVER.exists():
        return f"the NVIDIA driver does not support CUDA {cuda}, which this PyTorch was built with: update the driver"
    return "this machine has no NVIDIA driver: install it"


def processor_has_bf16() -> bool:
    """Return whether the processor multiplies bf16 in hardware; does not import PyTorch."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def random_state(device: Any) -> dict[str, Any]:
    """Return the state of the random numbers that a training on this ``torch.device`` draws, for its checkpoint."""
    import torch

    state = {"cpu": torch.get_rng_state()}
    return {**state, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def restore_random_state(states: Sequence[Mapping[str, Any]], device: Any, process: int) -> None:
    """Restore what :func:`random_state` returned in a process; other GPUs are not touched.

    A process that the training did not have when its checkpoint was written goes on with its own state.

    Args:
        states: the state of each process.
        device: ``torch.device`` of this process.
        process: number of this process.
    """
    import torch

    if process >= len(states):
        return
    state = states[process]
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def sent(tensor: Any, device: Any) -> Any:
    """Return a processor's tensor on a ``torch.device`` or one of that name, without waiting for what it is computing.

    A copy from ordinary memory would wait.
    """
    to_gpu = str(device).startswith("cuda")
    return tensor.pin_memory().to(device, non_blocking=True) if to_gpu else tensor.to(device)
