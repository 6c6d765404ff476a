"""Checks that a line's states do not depend on the other lines of its slab, and chooses slabs for which that holds."""

import logging

import numpy as np
from numpy.typing import NDArray

from models.ranker.inference.scorer import SlabScorer
from models.ranker.inference.slabs import ROWS_FOR_A_LINE, SLAB_ROWS
from models.ranker.prompt import Prompt


def settle_slabs(scorer: SlabScorer, prompt: Prompt) -> None:
    """Choose numbers of rows of a slab at which this machine gives a line the same states, bit by bit, in any company.

    A library may compute the last rows of a product by another kernel, or all rows of a small product, and that may
    depend on the number of threads. The largest number of rows is kept whose states depend neither on the order nor on
    the number of lines, and with it all others that give the same states. If there is none, each line gets a slab of
    its own, which costs time, and a warning says what moved and how far.

    Args:
        scorer: the language model; its ``slab_rows`` are set.
        prompt: a prompt with independent lines.
    """
    warn = logging.getLogger(__name__).warning
    for place in range(len(SLAB_ROWS) - 1, -1, -1):
        largest = SLAB_ROWS[place]
        reference = _states(scorer, prompt, largest)
        moved = {
            "order": _moved(_states(scorer, prompt, largest, reverse=True), reference),
            "number": _moved(_states(scorer, prompt, largest, count=1), reference),
        }
        if not any(moved.values()):
            smaller = [size for size in SLAB_ROWS[:place] if not _moved(_states(scorer, prompt, size), reference)]
            scorer.slab_rows = (*smaller, largest)
            return
        warn("in slabs of %d rows the lines' states depend on their %s", largest, _named(moved))
    scorer.slab_rows = ()
    reference = _states(scorer, prompt, None)
    moved = {"order": _moved(_states(scorer, prompt, None, reverse=True), reference)}
    if any(moved.values()):
        warn("this runtime does not repeat its results: even alone, lines' states depend on their %s", _named(moved))


def _states(
    scorer: SlabScorer, prompt: Prompt, rows: int | None, *, count: int | None = None, reverse: bool = False
) -> NDArray[np.float32]:
    """Return the states of the prompt's first lines [n, hidden], as many as one slab holds.

    Args:
        scorer: the language model.
        prompt: a prompt with independent lines.
        rows: number of rows of the slab; None for a slab of its own for each line.
        count: maximum number of lines.
        reverse: whether the lines stand in the slab in reverse order.
    """
    lines = prompt.lines()[:count]
    while rows and (sum(map(len, lines)) > rows or len(lines) * ROWS_FOR_A_LINE > rows):
        lines = lines[:-1]
    scorer.slab_rows = (rows,) if rows else ()
    order = lines[::-1] if reverse else lines
    states = scorer.independent_states(Prompt.of_lines(prompt.tokens[: prompt.prefix], order))
    return states[::-1] if reverse else states


def _moved(states: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Return the largest difference of the states of the lines that both hold."""
    shared = min(len(states), len(reference))
    return float(np.abs(states[:shared] - reference[:shared]).max(initial=0.0))


def _named(moved: dict[str, float]) -> str:
    return ", ".join(f"{axis} (by up to {change:.2g})" for axis, change in moved.items() if change)
