"""Training windows and padding, by hand."""

import numpy as np
import pytest

from models.retriever.batches import inputs_and_targets, pad_left, training_windows


def test_sequences_are_padded_and_cut_on_the_left():
    """The most recent items are kept, at the right end."""
    padded = pad_left([np.array([1, 2, 3, 4, 5]), np.array([6]), np.array([], int)], 3)
    assert padded.tolist() == [[3, 4, 5], [0, 0, 6], [0, 0, 0]]


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (4, [[4, 5, 6, 7]]),  # 7 < 2 * 4: the last four
        (3, [[5, 6, 7], [2, 3, 4], [1]]),  # 7 >= 2 * 3: windows back from the end, and the remainder
        (10, [[1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_windows_of_a_sequence_of_seven(length, expected):
    """LRURec's rule gives one window below two lengths, otherwise windows back from the end that do not overlap."""
    assert [window.tolist() for window in training_windows([np.arange(1, 8)], length)] == expected


def test_inputs_are_targets_shifted_by_one():
    """The first item of a window is predicted from padding."""
    inputs, targets = inputs_and_targets([np.array([7, 8, 9]), np.array([5])], 3)
    assert inputs.tolist() == [[0, 7, 8], [0, 0, 0]]
    assert targets.tolist() == [[7, 8, 9], [0, 0, 5]]
