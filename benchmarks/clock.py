"""The clock of the benchmarks: wall time, or processor time on a machine with other work."""

import argparse
import os
import time
from collections.abc import Callable

import torch


def add_clock(parser: argparse.ArgumentParser) -> None:
    """Add ``--threads`` and ``--busy``."""
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="Threads of a pass. Default: all cores."
    )
    parser.add_argument(
        "--busy", action="store_true", help="Measure processor seconds of one thread, on a machine with other work."
    )


def chosen_clock(given: argparse.Namespace) -> Callable[[], float]:
    """Return the chosen clock, in seconds: wall time, or the processor time of this process.

    PyTorch's thread count is set as a side effect.
    """
    if given.busy:
        given.threads = 1
    torch.set_num_threads(given.threads)
    return time.process_time if given.busy else time.perf_counter
