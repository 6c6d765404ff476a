"""What the benchmarks time with."""

import argparse
import os
import time
from collections.abc import Callable

import torch


def add_clock(parser: argparse.ArgumentParser) -> None:
    """Adds ``--threads`` and ``--busy``."""
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--busy", action="store_true", help="processor seconds of one thread, for a machine that others work on"
    )


def chosen_clock(given: argparse.Namespace) -> Callable[[], float]:
    """Seconds of the wall, or of this process's processor time; PyTorch's thread count is set."""
    if given.busy:
        given.threads = 1
    torch.set_num_threads(given.threads)
    return time.process_time if given.busy else time.perf_counter
