"""Packs candidates' independent lines into slabs: arrays of a few fixed shapes, whatever the candidates are.

A matrix product may sum in another order when its matrices have other shapes, so a score that is to depend on the user
and the item alone must come from products whose shapes depend on nothing else. A slab therefore has one of a few
numbers of rows and of lines; what remains of it is filled up with rows that nobody reads. Within a slab the rows of a
product do not depend on each other or on their places. Not every library promises that, so
:func:`models.ranker.inference.slab_check.settle_slabs` checks it when a ranker is loaded.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SLAB_ROWS = tuple(range(32, 257, 32))
"""Numbers of tokens of a slab, in ascending order. A product with more rows is hardly faster on a processor."""
ROWS_FOR_A_LINE = 8
"""A slab has one line for so many rows."""
SHORTEST_WIDTH = 16
"""Smallest number of keys of its own line that a token attends to; lines of more tokens get a power of two."""


@dataclass(frozen=True)
class Slab:
    """Tokens of several lines. Their states depend on the prefix and on their own line."""

    numbers: tuple[int, ...]
    """Which of the given lines the slab holds, in the order of ``ends``."""
    tokens: NDArray[np.int64]
    """Token ids [rows]."""
    positions: NDArray[np.int64]
    """Position of each token in its prompt [rows]; all lines begin at the same one."""
    members: NDArray[np.int64]
    """Row of each token of each line [lines, width]. A token attends to the members of its line up to itself, so what
    fills up a line is not seen by it."""
    slots: NDArray[np.int64]
    """Place of each row in the flattened ``members`` [rows]."""
    ends: NDArray[np.int64]
    """Row of each line's last token [lines]."""
    lasts: NDArray[np.int64]
    """Place of that token in its line [lines]."""


def new_slab(lines: Sequence[Sequence[int]], numbers: Sequence[int], start: int, rows: int, capacity: int) -> Slab:
    """Return a slab of these lines.

    Args:
        lines: the tokens of each line.
        numbers: see :class:`Slab`.
        start: position of each line's first token.
        rows: number of the slab's rows, at least that of all tokens.
        capacity: number of the slab's lines, at least that of the lines.
    """
    width = width_of(max(map(len, lines)))
    tokens, positions, slots = (np.zeros(rows, np.int64) for _ in range(3))
    members, (ends, lasts) = np.zeros((capacity, width), np.int64), np.zeros((2, capacity), np.int64)
    row = 0
    for place, line in enumerate(lines):
        end = row + len(line)
        own = np.arange(row, end)
        tokens[row:end], positions[row:end] = line, np.arange(start, start + len(line))
        members[place, : len(line)], slots[row:end] = own, place * width + np.arange(len(line))
        ends[place], lasts[place] = end - 1, len(line) - 1
        row = end
    return Slab(tuple(numbers), tokens, positions, members, slots, ends, lasts)


def prefix_slab(tokens: Sequence[int]) -> Slab:
    """Return a slab with one line, which is a prefix and continues nothing."""
    rows = np.arange(len(tokens))
    return Slab((0,), np.asarray(tokens, np.int64), rows, rows[None], rows, rows[-1:], rows[-1:])


def width_of(length: int) -> int:
    """Return the number of keys that a token of a line of this length attends to in its own line."""
    return max(SHORTEST_WIDTH, 1 << (length - 1).bit_length())


def slabs_of(lines: Sequence[Sequence[int]], start: int, sizes: Sequence[int]) -> Iterator[Slab]:
    """Yield slabs that hold each line once; lines of another width never share one.

    Args:
        lines: the tokens of each line.
        start: position of each line's first token.
        sizes: numbers of rows of a slab, in ascending order; none for one line a slab. A line that is longer than any
            of them gets a slab of its own.
    """
    waiting: dict[int, list[int]] = {}
    for number, line in enumerate(lines):
        width = width_of(len(line))
        if not sizes or width > sizes[-1]:
            yield new_slab([line], [number], start, width, 1)
            continue
        held = waiting.setdefault(width, [])
        if _size(lines, [*held, number], sizes) is None:
            yield _filled(lines, held, start, sizes)
            held.clear()
        held.append(number)
    for held in waiting.values():
        yield _filled(lines, held, start, sizes)


def _filled(lines: Sequence[Sequence[int]], held: Sequence[int], start: int, sizes: Sequence[int]) -> Slab:
    rows = _size(lines, held, sizes)
    assert rows is not None
    return new_slab([lines[number] for number in held], held, start, rows, rows // ROWS_FOR_A_LINE)


def _size(lines: Sequence[Sequence[int]], held: Sequence[int], sizes: Sequence[int]) -> int | None:
    """Return the smallest of the sizes that holds these lines; None if there is none."""
    rows = max(sum(len(lines[number]) for number in held), ROWS_FOR_A_LINE * len(held))
    return next((size for size in sizes if size >= rows), None)
