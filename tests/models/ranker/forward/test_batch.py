"""Packing: every item stands whole in one pass, at its positions, and sees its own tokens."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.ranker.forward.batch import (
    BUCKET_ROWS,
    FILLING,
    LONGEST,
    Arrays,
    Bucket,
    Item,
    Need,
    bucket_for,
    cut,
    grouped,
    pack,
)

BUCKET_SMALL = Bucket(512, lines=True)
PREFIX = list(range(100, 110))


def arrays_of(items: list[Item], bucket: Bucket) -> Arrays:
    flat = pack(items, bucket)
    return Arrays(*np.split(flat, np.cumsum(bucket.parts)[:-1]))


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=7))
def test_whole_prompts_stand_one_after_the_other(lengths: list[int]):
    """Sequences begin and end with the prompts; what is left over is filled up with sequences of at most FILLING."""
    bucket = Bucket(512, lines=False)
    items = [Item.whole(list(range(1, length + 1)), [length - 1, 0]) for length in lengths]
    arrays = arrays_of(items, bucket)
    starts = np.cumsum([0, *lengths])
    assert arrays.queries[: len(lengths) + 1].tolist() == starts.tolist()
    fillers = np.diff(arrays.queries[len(lengths) :])
    assert 0 <= fillers.min() <= fillers.max() <= FILLING
    assert arrays.queries[-1] == bucket.rows
    for number, (start, length) in enumerate(zip(starts, lengths, strict=False)):
        rows = slice(start, start + length)
        assert arrays.tokens[rows].tolist() == list(range(1, length + 1))
        assert arrays.positions[rows].tolist() == list(range(length))
        assert arrays.places[2 * number : 2 * number + 2].tolist() == [start + length - 1, start]


def test_a_line_sees_the_prefix_and_itself():
    """Two lines of 2 and 1 tokens after 3: their keys are rows 0-2 and 3-4, and rows 0-2 and 5, worked out by hand."""
    arrays = arrays_of([Item.of_lines([7, 8, 9], [[1, 2], [3]])], BUCKET_SMALL)
    assert arrays.tokens[:6].tolist() == [7, 8, 9, 1, 2, 3]
    assert arrays.positions[:6].tolist() == [0, 1, 2, 3, 4, 3]
    assert arrays.queries[:4].tolist() == [0, 3, 5, 6]
    assert arrays.keys[:4].tolist() == [0, 3, 8, 12]
    assert arrays.key_rows[:12].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5]
    assert arrays.places[:2].tolist() == [4, 5]
    assert arrays.queries[-1] == BUCKET_SMALL.rows
    assert arrays.keys[-1] == 12 + BUCKET_SMALL.rows - 6


@given(lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=30), limit=st.sampled_from([(512,), BUCKET_ROWS]))
def test_a_pass_is_found_for_every_group(lengths: list[int], limit: tuple[int, ...]):
    """Groups keep the order, and each fits the smallest shape that holds it; what is too large is by itself."""
    items = [Item.whole([0] * length, [length - 1]) for length in lengths]
    largest = Bucket(limit[-1], lines=False)
    groups = grouped(items, largest)
    assert list(chain.from_iterable(groups)) == list(range(len(items)))
    for group in groups:
        need = Need()
        for number in group:
            need = need.plus(items[number].need)
        bucket = bucket_for(need, limit, lines=False)
        assert bucket.holds(need)
        assert bucket.rows in limit or len(group) == 1
        smaller = [rows for rows in limit if rows < bucket.rows]
        assert not any(Bucket(rows, lines=False).holds(need) for rows in smaller)
        assert (bucket.longest > LONGEST) == (need.longest > LONGEST)


@given(lengths=st.lists(st.integers(1, 700), min_size=1, max_size=60))
def test_lines_that_exceed_a_pass_are_cut_between_lines(lengths: list[int]):
    """Each part has the whole prefix, and the parts' lines are the item's in the same order."""
    item = Item.of_lines(PREFIX, [[number] * length for number, length in enumerate(lengths)])
    parts = cut(item, BUCKET_SMALL)
    assert [line for part in parts for line in part.lines] == list(item.lines)
    assert all(list(part.prefix) == PREFIX for part in parts)
    assert all(BUCKET_SMALL.holds(part.need) for part in parts if len(part.lines) > 1)


@pytest.mark.parametrize("lines", [False, True])
def test_a_full_pass_has_room_for_its_fillers(lines: bool):
    """As many sequences of one token as fit leave enough sequences and keys to fill the pass up."""
    bucket = Bucket(512, lines)
    item = Item.of_lines([1], [[2]] * 20) if lines else Item.whole([1], [0])
    count = 0
    need = Need()
    while bucket.holds(need.plus(item.need)):
        need, count = need.plus(item.need), count + 1
    arrays = arrays_of([item] * count, bucket)
    assert count >= 2
    assert arrays.queries[-1] == bucket.rows
