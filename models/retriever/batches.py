"""Turns sequences into left-padded arrays: training windows and histories."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Items = NDArray[np.int32]


def pad_left(sequences: Sequence[Items], length: int) -> NDArray[np.int64]:
    """Return the last ``length`` items of each sequence, left-padded with zeros [len(sequences), length]."""
    padded = np.zeros((len(sequences), length), dtype=np.int64)
    for row, items in zip(padded, sequences, strict=True):
        kept = items[-length:] if len(items) else items
        row[length - len(kept) :] = kept
    return padded


def training_windows(sequences: Sequence[Items], length: int) -> list[Items]:
    """Cut training sequences into windows of targets, and return the windows.

    A sequence shorter than two windows gives its last ``length`` items. A longer one gives windows that do not overlap,
    counted back from its end (as LRURec's authors do; see Yue et al. 2024, section 4.1).
    """
    windows = []
    for items in sequences:
        if len(items) < 2 * length:
            windows.append(items[-length:])
        else:
            windows.extend(items[max(end - length, 0) : end] for end in range(len(items), 0, -length))
    return windows


def inputs_and_targets(windows: Sequence[Items], length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the inputs and targets of next-item prediction, each [len(windows), length].

    Targets are the windows, and inputs are the windows shifted by one: a window's first item is predicted from padding.
    """
    targets = pad_left(windows, length)
    inputs = np.roll(targets, 1, axis=1)
    inputs[:, 0] = 0
    return inputs, targets
