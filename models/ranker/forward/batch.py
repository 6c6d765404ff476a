"""Packs prompts into the fixed shapes of a pass.

A pass has one of a few shapes, so that a row's products are computed by kernels that depend on the shape alone, and so
that a CUDA graph can be captured for each. What prompts leave of a shape is filled up with short sequences of their
own, which nobody reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

BUCKET_ROWS = (512, 1024, 2048, 4096, 8192, 16384)
"""Numbers of rows, which are tokens, of a pass, in ascending order."""
LONGEST = 2048
"""Maximum number of tokens of a prompt, or of a prefix and one line, that shares a pass with others."""
FILLING = 256
"""Maximum length of a sequence that fills a pass up; longer ones would attend to more keys for nothing."""
KEYS_A_ROW = 16
"""Keys of a pass over independent lines for each row: a line of 20 tokens may continue a prefix of 300."""
Flat = TypeVar("Flat")


@dataclass(frozen=True)
class Item:
    """What a prompt contributes to a pass: one sequence, and lines that continue it, each for itself."""

    prefix: Sequence[int]
    """Token ids of the whole prompt, or of what the lines continue."""
    lines: Sequence[Sequence[int]]
    """Token ids of each line; none in a whole prompt."""
    places: Sequence[int]
    """Rows that are read, counted from the item's first, in the order of prefix and lines."""

    @classmethod
    def whole(cls, tokens: Sequence[int], places: Sequence[int]) -> "Item":
        """Return a whole prompt, read at these positions."""
        return cls(tokens, (), places)

    @classmethod
    def of_lines(cls, prefix: Sequence[int], lines: Sequence[Sequence[int]]) -> "Item":
        """Return independent lines that continue a prefix, each read at its end."""
        return cls(prefix, lines, [end - 1 for end in accumulate(map(len, lines), initial=len(prefix))][1:])

    @cached_property
    def need(self) -> "Need":
        """What the item takes of a pass."""
        ends = [len(self.prefix), *(len(self.prefix) + len(line) for line in self.lines)]
        rows = len(self.prefix) + sum(map(len, self.lines))
        return Need(rows, len(ends), sum(ends), len(self.places), max(ends))


class Need(NamedTuple):
    """What items take of a pass."""

    rows: int = 0
    sequences: int = 0
    keys: int = 0
    reads: int = 0
    longest: int = 0
    """Number of keys of the longest sequence."""

    def plus(self, other: "Need") -> "Need":
        """Return what both take together."""
        return Need(
            self.rows + other.rows,
            self.sequences + other.sequences,
            self.keys + other.keys,
            self.reads + other.reads,
            max(self.longest, other.longest),
        )


@dataclass(frozen=True)
class Bucket:
    """The shape of a pass."""

    rows: int
    """Number of rows."""
    lines: bool
    """Whether the pass is over independent lines."""
    longest: int = LONGEST
    """Maximum number of keys of a sequence."""

    @property
    def reads(self) -> int:
        """Number of rows that are read."""
        return self.rows // 8

    @property
    def fillers(self) -> int:
        """Number of sequences that an empty pass takes to be filled up."""
        return -(-self.rows // FILLING)

    @property
    def sequences(self) -> int:
        """Number of sequences, those that fill the pass up included; some are empty."""
        return self.fillers + self.rows // (8 if self.lines else 64)

    @property
    def keys(self) -> int:
        """Number of keys that are gathered."""
        return KEYS_A_ROW * self.rows if self.lines else 0

    @property
    def parts(self) -> tuple[int, ...]:
        """Lengths of the arrays of :class:`Arrays`."""
        ends = self.sequences + 1
        return (self.rows, self.rows, self.reads, ends, ends if self.lines else 0, self.keys)

    def holds(self, need: Need) -> bool:
        """Return whether a pass of this shape has room for it."""
        filled = self.rows - need.rows
        return (
            need.rows <= self.rows
            and need.sequences + self.fillers <= self.sequences
            and need.reads <= self.reads
            and need.longest <= self.longest
            and (not self.lines or need.keys + filled <= self.keys)
        )


class Arrays(NamedTuple):
    """The arrays of a pass, which are consecutive parts of one, so that one copy takes them to a device."""

    tokens: NDArray[np.int32]
    """Token ids [rows]."""
    positions: NDArray[np.int32]
    """Position of each token in its prompt [rows]."""
    places: NDArray[np.int32]
    """Rows that are read [reads]; what is left over reads row 0."""
    queries: NDArray[np.int32]
    """First row of each sequence and the end of the last [sequences + 1]."""
    keys: NDArray[np.int32]
    """First key of each sequence and the end of the last [sequences + 1]; in whole prompts none, as the next."""
    key_rows: NDArray[np.int32]
    """Row of each key [keys]; what is left over is row 0."""


def pack(items: Sequence[Item], bucket: Bucket) -> NDArray[np.int32]:
    """Return the arrays of a pass over these items, one after the other; see :class:`Arrays`.

    Args:
        items: the items, in the order of their rows.
        bucket: a shape that holds them.
    """
    flat = np.zeros(sum(bucket.parts), np.int32)
    arrays = Arrays(*np.split(flat, np.cumsum(bucket.parts)[:-1]))
    lengths: list[int] = []
    key_rows: list[NDArray[np.int64]] = []
    row = read = 0
    for item in items:
        arrays.places[read : read + len(item.places)] = np.asarray(item.places, np.int64) + row
        read += len(item.places)
        prefix = np.arange(row, row + len(item.prefix))
        for number, tokens in enumerate((item.prefix, *item.lines)):
            own = np.arange(row, row + len(tokens))
            start = len(item.prefix) if number else 0
            arrays.tokens[own] = tokens
            arrays.positions[own] = np.arange(start, start + len(tokens))
            lengths.append(len(tokens))
            key_rows.append(np.concatenate([prefix, own]) if number else own)
            row += len(tokens)
    for start in range(row, bucket.rows, FILLING):
        own = np.arange(start, min(start + FILLING, bucket.rows))
        lengths.append(len(own))
        key_rows.append(own)
    _write_ends(arrays.queries, lengths)
    if bucket.lines:
        _write_ends(arrays.keys, [len(rows) for rows in key_rows])
        gathered = np.concatenate(key_rows)
        arrays.key_rows[: len(gathered)] = gathered
    return flat


def _write_ends(ends: NDArray[np.int32], lengths: Sequence[int]) -> None:
    """Write the ends of consecutive sequences; those that are left over are empty."""
    ends[1 : len(lengths) + 1] = np.cumsum(lengths)
    ends[len(lengths) + 1 :] = ends[len(lengths)]


def bucket_for(need: Need, sizes: Sequence[int], *, lines: bool) -> Bucket:
    """Return the smallest shape that holds what items need.

    Args:
        need: what they need.
        sizes: numbers of rows, in ascending order. What is larger, or longer than :data:`LONGEST`, gets a shape of its
            own: the next power of two.
        lines: whether the items have independent lines.
    """
    for rows in sizes:
        if (bucket := Bucket(rows, lines)).holds(need):
            return bucket
    longest = max(LONGEST, 1 << (need.longest - 1).bit_length())
    rows = max([longest, *sizes[-1:]])
    while not (bucket := Bucket(rows, lines, longest)).holds(need):
        rows *= 2
    return bucket


def cut(item: Item, largest: Bucket) -> list[Item]:
    """Return an item's lines in parts that each fit a pass with the prefix; a whole prompt stays whole."""
    parts: list[Item] = []
    held: list[Sequence[int]] = []
    prefix = need = Item.whole(item.prefix, ()).need
    for line in item.lines:
        seen = len(item.prefix) + len(line)
        more = Need(len(line), 1, seen, 1, seen)
        if held and not largest.holds(need.plus(more)):
            parts.append(Item.of_lines(item.prefix, held))
            held, need = [], prefix
        held.append(line)
        need = need.plus(more)
    return [*parts, Item.of_lines(item.prefix, held)] if parts else [item]


def grouped(items: Sequence[Item], largest: Bucket) -> list[list[int]]:
    """Return the items' numbers in consecutive groups, each of which one pass holds; a larger item is by itself."""
    groups: list[list[int]] = []
    need = Need()
    for number, item in enumerate(items):
        together = need.plus(item.need)
        if groups and largest.holds(together):
            groups[-1].append(number)
            need = together
        else:
            groups.append([number])
            need = item.need
    return groups
