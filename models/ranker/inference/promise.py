"""Checks that what prompts share a pass with does not change their states, and chooses passes for which that holds.

An answer must not depend on who shares its batch. The shape of a pass decides which kernels compute it, so within one
shape the rows of a product should not depend on each other or on their places, and two shapes may differ. No library
promises either, so both are checked when a ranker is loaded.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from models.ranker.forward.batch import LONGEST, Bucket, Item, Need
from models.ranker.prompt import Prompt

Together = Literal["prompts", "prompt", "line"]
"""What shares a pass: several prompts, one prompt with its lines, or one line with its prefix."""
Run = Callable[[Sequence[Item], Bucket], Sequence[NDArray[np.float32]]]
"""Computes items in one pass of this shape and returns what was read of each [reads, values]."""
PROBED = 4
"""Number of prompts that are checked."""
SHORT = 24
"""Number of tokens of the sequences that the same prompts are cut to. They fit every shape beside others."""
COMPANY_TOLERANCE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 8e-2, "float8": 0.5}
"""Largest deviation, relative to the largest value, that company may cause if the runtime is tolerant."""

TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Settled:
    """Passes in which a prompt gets the same states whatever it shares them with."""

    rows: tuple[int, ...]
    """Numbers of rows of the passes, in ascending order."""
    together: Together
    """What shares a pass."""


def settle_buckets(run: Run, sizes: Sequence[int], prompts: Sequence[Prompt], tolerance: float = 0.0) -> Settled:
    """Return the passes in which this machine gives prompts the same states, bit by bit, in any company and place.

    Each prompt, and a short one cut from it, is computed alone, and with others before and after it that fill the pass,
    in every shape. A shape in which that changes anything is dropped. Of the others, those are kept that agree with
    each other: as many as possible, one of which suits a single prompt, and the larger ones if there is a choice. If
    none is left, one prompt, or one line with its prefix, gets a pass of its own, which costs time. Warnings say what
    was dropped and how far it moved.

    Args:
        run: computes a pass.
        sizes: numbers of rows of the passes, in ascending order.
        prompts: prompts of the ranker: all with independent lines, or none.
        tolerance: largest deviation, relative to the largest value, that is accepted instead of equal bits.
    """
    warn = logging.getLogger(__name__).warning
    lines = bool(prompts[0].prefix)
    items = probe_items(prompts)
    alone: dict[int, dict[int, NDArray[np.float32]]] = {}
    for rows in sizes:
        bucket = Bucket(rows, lines)
        found = {number: run([item], bucket)[0] for number, item in enumerate(items) if bucket.holds(item.need)}
        moved = max((_moved(company, found, run, bucket) for company in _companies(items, bucket)), default=0.0)
        if moved <= tolerance:
            alone[rows] = found
        else:
            warn("in passes of %d tokens scores depend on what shares the pass (by up to %.2g)", rows, moved)
    groups = [tuple(size for size in alone if _apart(alone[size], alone[chosen]) <= tolerance) for chosen in alone]
    if not groups:
        warn("no pass keeps scores independent of what shares it: each %s is computed alone", _unit(lines))
        return Settled(tuple(sizes), "line")
    kept = max(groups, key=lambda group: (group[0] <= LONGEST, len(group), group[-1]))
    for rows in sorted(alone.keys() - set(kept)):
        apart = _apart(alone[rows], alone[kept[-1]])
        warn("passes of %d tokens give other scores than those of %d (by up to %.2g)", rows, kept[-1], apart)
    return Settled(kept, "prompts")


def probe_items(prompts: Sequence[Prompt]) -> list[Item]:
    """Return what is checked: the first prompts as they are read, whole and cut short."""
    items = []
    for prompt in prompts[:PROBED]:
        if prompt.prefix:
            prefix, lines = prompt.tokens[: prompt.prefix], prompt.lines()
            items += [Item.of_lines(prefix, lines), Item.of_lines(prefix[: SHORT // 2], [lines[0][: SHORT // 2]])]
        else:
            short = prompt.tokens[:SHORT]
            last = len(prompt.tokens) - 1
            items += [Item.whole(prompt.tokens, [*prompt.line_ends, last]), Item.whole(short, [len(short) - 1])]
    return items


def _companies(items: Sequence[Item], bucket: Bucket) -> Iterator[list[tuple[int, Item]]]:
    """Yield fillings of a pass with numbered items, so that each item has others before it, after it, and both."""
    numbered = list(enumerate(items))
    half = len(numbered) // 2
    for order in (numbered, numbered[::-1], [*numbered[half:], *numbered[:half]], numbered[1::2]):
        held: list[tuple[int, Item]] = []
        need, added = Need(), True
        while added:
            added = False
            for number, item in order:
                if bucket.holds(together := need.plus(item.need)):
                    held.append((number, item))
                    need, added = together, True
        if len(held) > 1:
            yield held


def _moved(
    company: Sequence[tuple[int, Item]], alone: dict[int, NDArray[np.float32]], run: Run, bucket: Bucket
) -> float:
    """Return how far the items of a pass are from what each is alone."""
    found = run([item for _, item in company], bucket)
    return max(_distance(part, alone[number]) for (number, _), part in zip(company, found, strict=True))


def _apart(found: dict[int, NDArray[np.float32]], others: dict[int, NDArray[np.float32]]) -> float:
    """Return how far two shapes are apart on the items that both hold."""
    return max((_distance(found[number], others[number]) for number in found.keys() & others.keys()), default=0.0)


def _distance(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Return the largest deviation relative to the largest value: 0 for equal bits, infinite for what is no number."""
    if found.tobytes() == expected.tobytes():
        return 0.0
    apart = float(np.abs(found - expected).max()) / max(float(np.abs(expected).max()), TINY)
    # Zeros of another sign have other bits and no distance.
    return max(apart, TINY) if np.isfinite(apart) else np.inf


def _unit(lines: bool) -> str:
    return "line with its prefix" if lines else "prompt"
