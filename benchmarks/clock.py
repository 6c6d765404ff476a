"""The clock of the benchmarks: wall time, or processor time on a machine with other work."""

import argparse
import os
import time
from collections.abc import Callable

import torch

from models.device import torch_device
from preprocessing.errors import InputError


def add_clock(parser: argparse.ArgumentParser) -> None:
    """Add ``--threads`` and ``--busy``."""
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="Threads of a pass. Default: all cores."
    )
    parser.add_argument(
        "--busy", action="store_true", help="Measure processor seconds of one thread, on a machine with other work."
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``."""
    parser.add_argument("--device", default="cpu", help="Device of the language model: `cpu`, `gpu` or `gpu:N`.")


def chosen_clock(given: argparse.Namespace) -> Callable[[], float]:
    """Return the chosen clock, in seconds: wall time, or the processor time of this process.

    PyTorch's thread count is set as a side effect, and ``given.device``, if it was added, becomes PyTorch's name of the
    device. The clock of a GPU waits for what it was given to do.

    Raises:
        InputError: this machine has no such device, or processor time is to be measured of a GPU.
    """
    device = given.device = torch_device(getattr(given, "device", "cpu"))
    if given.busy:
        if device != "cpu":
            raise InputError("--busy measures processor time, and a GPU has none: leave it out")
        given.threads = 1
    torch.set_num_threads(given.threads)
    if device == "cpu":
        return time.process_time if given.busy else time.perf_counter

    def wait_and_read() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return wait_and_read
