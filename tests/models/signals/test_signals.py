"""The weighted sum of retrievers and signals: its parts by hand, that items do not depend on each other, and files."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from retrieval import random_signals, random_statistics, weights
from safetensors.numpy import load_file, save_file

from models.signals.graph import ItemGraph
from models.signals.likeness import TitleLikeness
from models.signals.signals import RECENT, SIGNALS, STATISTICS_FILE, WEIGHTS_FILE, ItemStatistics, Signals
from models.sparse import SparseRows

ITEMS = 60
NOTHING = np.empty(0, np.int32)
RANDOM = {retrievers: random_signals(ITEMS, retrievers, pool=10) for retrievers in (1, 2)}


def by_hand() -> ItemStatistics:
    """Return statistics of items 1 to 4, whose titles are the vectors (1, 0), (0, 1), (.6, .8) and none over two words.

    Item 3 followed item 1 three times and item 2 once, and its co-occurrence with item 2 is .4.

    Items occurred 0, 1, 3 and 7 times in the training sequences.
    """
    titles = SparseRows(
        np.array([0, 0, 1, 2, 4, 4]), np.array([0, 1, 0, 1], np.int32), np.array([1, 1, 0.6, 0.8], np.float32)
    )
    counts = SparseRows(np.array([0, 0, 1, 2, 2, 2]), np.array([3, 3], np.int32), np.array([3, 1], np.float32))
    near = SparseRows(np.array([0, 0, 0, 1, 2, 2]), np.array([3, 2], np.int32), np.array([0.4, 0.4], np.float32))
    popularity = np.log1p([0, 0, 1, 3, 7]).astype(np.float32)
    return ItemStatistics(popularity, TitleLikeness(titles), ItemGraph(counts), ItemGraph(near))


def test_signals_by_hand():
    """After items 2 and 1, the latest, item 3 is like 1 by .6 and like 2 by .8, and followed 1 three times, 2 once.

    The columns are log(1 + occurrences), the mean, maximum and latest likeness, log(1 + 3 + 1/2), and half the
    co-occurrence with item 2. Item 4 has no title, followed nothing and was near nothing.
    """
    found = by_hand().signals(np.array([2, 1], np.int32), np.array([3, 4], np.int32))
    expected = [[np.log(4), 0.7, 0.8, 0.6, np.log(4.5), 0.2], [np.log(8), 0, 0, 0, 0, 0]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert SIGNALS == ("popularity", "likeness_mean", "likeness_max", "likeness_last", "transitions", "co_occurrence")


def test_scores_are_the_weighted_sum():
    """By hand: 2 x 1.5 + 3 x -1 of the retrievers, and 1 x log 4 + 10 x .7 + 100 x .6 of the signals."""
    both = weights((2, 3), popularity=1, likeness_mean=10, likeness_last=100)
    signals = Signals(by_hand(), both, pool=5)
    history, items = np.array([2, 1], np.int32), np.array([3], np.int32)
    found = signals.scores(history, items, np.array([[1.5, -1.0]], np.float32))
    assert found.tolist() == pytest.approx([3 - 3 + np.log(4) + 7 + 60])


def test_without_a_history_only_popularity_tells():
    """Likeness and transitions are 0 for a user without items, as for one whose items nobody else has."""
    found = by_hand().signals(NOTHING, np.array([1, 3], np.int32))
    np.testing.assert_allclose(found, [[0, 0, 0, 0, 0, 0], [np.log(4), 0, 0, 0, 0, 0]], rtol=1e-6)


def test_the_recent_history_is_ten_items():
    """Older items change nothing; the oldest of the ten does. Item 1 has a title and followers, item 4 has neither."""
    items, silent = np.array([2, 3], np.int32), np.full(RECENT - 1, 4, np.int32)
    statistics = by_hand()
    oldest_of_ten = statistics.signals(np.append(np.int32(1), silent), items)
    beyond = statistics.signals(np.concatenate(([1, 4], silent)).astype(np.int32), items)
    np.testing.assert_allclose(oldest_of_ten[1, 1:], [0.06, 0.6, 0, np.log1p(3 / RECENT), 0], rtol=1e-6)
    assert not beyond[:, 1:].any()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, ITEMS), max_size=15),
    st.lists(st.integers(1, ITEMS), min_size=1, max_size=ITEMS, unique=True),
    st.integers(1, 2),
    st.integers(0, 1 << 30),
    st.data(),
)
def test_an_items_score_does_not_depend_on_the_pool(history, pool, retrievers, seed, data):
    """For any subset of any pool, the scores are the same to the last bit: the order of two items depends on no other.

    Otherwise a request that excludes an item, or a caller's own candidates, could exchange two items that nearly tie.
    """
    signals, history = RANDOM[retrievers], np.array(history, np.int32)
    items = np.sort(np.array(pool, np.int32))
    logits = np.random.default_rng(seed).normal(size=(len(items), retrievers)).astype(np.float32)
    kept = np.array(data.draw(st.lists(st.sampled_from(range(len(items))), min_size=1, unique=True).map(sorted)))
    whole = signals.scores(history, items, logits)
    np.testing.assert_array_equal(signals.scores(history, items[kept], logits[kept]), whole[kept])


def test_a_large_pool_scores_as_its_items_alone():
    """Matrix products compute blocks of rows differently, which shows with pools of hundreds of items only."""
    signals, rng = random_signals(300, 2, pool=200), np.random.default_rng(1)
    for count in (0, 1, 3, 8, 9, 12):
        history = rng.integers(1, 301, count).astype(np.int32)
        items = np.sort(rng.choice(np.arange(1, 301), 200, replace=False)).astype(np.int32)
        logits = rng.normal(size=(200, 2)).astype(np.float32)
        whole = signals.scores(history, items, logits)
        for size in (1, 2, 7, 20, 199):
            np.testing.assert_array_equal(signals.scores(history, items[:size], logits[:size]), whole[:size])


def test_no_items_have_no_scores():
    """An empty pool, for a user who has seen everything, or a caller without a known candidate."""
    signals = RANDOM[1]
    for history in (NOTHING, np.array([1, 2], np.int32)):
        assert signals.scores(history, NOTHING, np.empty((0, 1), np.float32)).shape == (0,)


def test_what_is_saved_loads_to_the_same(tmp_path: Path, monkeypatch):
    """Weights, size of the pool and statistics read back to the last bit, from JSON and safetensors alone."""
    signals = random_signals(ITEMS, 2, pool=17)
    signals.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"signals.json", "signals.safetensors"}

    def refuse(*_, **__):
        raise AssertionError("nothing may be unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    loaded = Signals.load(tmp_path)
    assert (loaded.weights, loaded.pool) == (signals.weights, 17)
    rng = np.random.default_rng(0)
    items, history = np.arange(1, ITEMS + 1, dtype=np.int32), np.array([5, 9, 5], np.int32)
    logits = rng.normal(size=(ITEMS, 2)).astype(np.float32)
    np.testing.assert_array_equal(loaded.scores(history, items, logits), signals.scores(history, items, logits))


def test_a_folder_without_signals_has_none(tmp_path: Path):
    """A retriever that was trained without signals, or by an earlier version, has no such files."""
    assert Signals.load(tmp_path) is None


def test_signals_of_an_earlier_version_load(tmp_path: Path):
    """Before co-occurrence was counted there was no such graph and no such weight: it is 0 for all items."""
    signals = random_signals(ITEMS, 1, pool=17)
    signals.save(tmp_path)
    stored = json.loads((tmp_path / WEIGHTS_FILE).read_text())
    del stored["weights"]["co_occurrence"]
    (tmp_path / WEIGHTS_FILE).write_text(json.dumps(stored))
    tensors = load_file(tmp_path / STATISTICS_FILE)
    kept = {name: array for name, array in tensors.items() if not name.startswith("co_occurrence.")}
    save_file(kept, tmp_path / STATISTICS_FILE)
    loaded = Signals.load(tmp_path)
    items, history = np.arange(1, ITEMS + 1, dtype=np.int32), np.array([5, 9, 5], np.int32)
    logits = np.zeros((ITEMS, 1), np.float32)
    without = replace(signals, weights={**signals.weights, "co_occurrence": 0.0})
    np.testing.assert_array_equal(loaded.scores(history, items, logits), without.scores(history, items, logits))
    assert not loaded.statistics.signals(history, items)[:, SIGNALS.index("co_occurrence")].any()


def test_statistics_of_nothing_can_be_stored(tmp_path: Path):
    """Items without titles and without edges: matrices without entries are written and read back."""
    nothing = SparseRows(np.zeros(4, np.int64), np.empty(0, np.int32), np.empty(0, np.float32))
    statistics = ItemStatistics(np.zeros(3, np.float32), TitleLikeness(nothing), ItemGraph(nothing), ItemGraph(nothing))
    statistics.save(tmp_path)
    items = np.array([1, 2], np.int32)
    assert not ItemStatistics.load(tmp_path).signals(items, items).any()


def test_random_statistics_have_every_signal():
    """The stand-in of these tests is worth its name: no signal is 0 for all items."""
    found = random_statistics(ITEMS).signals(np.array([1, 2, 3], np.int32), np.arange(1, ITEMS + 1, dtype=np.int32))
    assert (found != 0).any(axis=0).all()
