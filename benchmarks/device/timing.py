"""Times work on a device, whose calls return before the work is done."""

import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def synchronize(device: str) -> None:
    """Wait until the device has finished everything that it was given."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], Result], device: str) -> tuple[Result, float]:
    """Return what a call returns, and the seconds that it and its work on the device take."""
    synchronize(device)
    started = time.perf_counter()
    result = run()
    synchronize(device)
    return result, time.perf_counter() - started


def seconds_of(run: Callable[[], Any], device: str) -> float:
    """Return the seconds that one call and its work on the device take."""
    return timed(run, device)[1]


def median_seconds(run: Callable[[], Any], device: str, rounds: int) -> float:
    """Return the median seconds of several calls, after one that is not measured."""
    run()
    return statistics.median(seconds_of(run, device) for _ in range(rounds))


def matmul_rate(device: str, dtype: torch.dtype, size: int, rounds: int = 10) -> float:
    """Return the floating-point operations per second of the product of two random square matrices.

    Random numbers matter: on zeros a GPU needs less power and is faster.
    """
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: torch.mm(a, b), device, rounds)


def peak_bytes(device: str) -> int:
    """Return the largest amount of GPU memory that tensors took since :func:`reset_peak`; 0 on a processor."""
    return 0 if device == "cpu" else int(torch.cuda.max_memory_allocated(device))


def reset_peak(device: str) -> None:
    """Let :func:`peak_bytes` start anew, without memory that is only cached."""
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
