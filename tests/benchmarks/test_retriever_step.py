"""The batches that the training step is timed on."""

import pytest

from benchmarks.retriever_step import SHAPES, batch


@pytest.mark.parametrize("name", SHAPES)
def test_batches_have_the_shape_and_the_padding_of_real_windows(name: str):
    """Every window has at least two items to learn from; of Beauty's places most are padding."""
    size, length, items, _, _ = SHAPES[name]
    inputs, targets = batch(name, seed=0)
    assert inputs.shape == targets.shape == (size, length)
    assert int(targets.max()) <= items
    assert ((targets > 0).sum(dim=1) >= 2).all()
    if name == "beauty":
        assert (inputs == 0).float().mean() > 0.5
