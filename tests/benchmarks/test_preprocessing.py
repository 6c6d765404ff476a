"""The generated interactions that the data stage is timed on."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks.preprocessing import UNTITLED, generate, zipf


def test_the_head_is_heavy_and_the_tail_is_long():
    """With 1,000 kinds, number 0 has the share (1/10) / (sum of 1/(r + 10) over r from 0 to 999)."""
    drawn = zipf(np.random.default_rng(0), 1_000, 100_000)
    share = (1 / 10) / (1 / (np.arange(1_000) + 10)).sum()
    assert abs((drawn == 0).mean() - share) < 4 * np.sqrt(share / 100_000)  # four standard errors
    assert drawn.min() == 0
    assert drawn.max() > 990


def test_a_title_belongs_to_its_item_and_a_few_items_have_none(tmp_path: Path):
    """The title filter has something to drop in every contender."""
    generate(20_000, tmp_path / "raw.parquet")
    table = pq.read_table(tmp_path / "raw.parquet")
    pairs = set(zip(table["item"].to_pylist(), table["title"].to_pylist(), strict=True))
    assert len(pairs) == len({item for item, _ in pairs})
    assert {title for item, title in pairs if title} == {f"title {item}" for item, title in pairs if title}
    untitled = sum(title is None for _, title in pairs) / len(pairs)
    assert 0 < untitled < 4 * UNTITLED
