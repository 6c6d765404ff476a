"""The retrieval stage: selecting candidates from the rows of one or two retrievers, with signals and without."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from retrieval import log_softmax, random_signals, random_statistics, weights

from models.retriever.candidates import top_candidates
from models.retriever.stage import RetrievalStage, pool_of, rank_in
from models.signals.signals import Signals

ITEMS = 50
NOTHING = np.empty(0, np.int32)
STATISTICS = random_statistics(ITEMS)
RANDOM = {retrievers: random_signals(ITEMS, retrievers, pool=8) for retrievers in (1, 2)}

items_of = st.lists(st.integers(1, ITEMS), max_size=12).map(lambda items: np.array(items, np.int32))
seeds = st.integers(0, 1 << 30)


def random_rows(seed: int, retrievers: int = 1) -> list[NDArray[np.float32]]:
    """Return rows of logits with some ties; the padding's is the highest, so that it shows if it is not masked."""
    rng = np.random.default_rng(seed)
    rows = [np.round(rng.normal(size=ITEMS + 1), 1).astype(np.float32) for _ in range(retrievers)]
    for row in rows:
        row[0] = 1e3
    return rows


def copies(rows: list[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    """Return rows that may be masked in place."""
    return [row.copy() for row in rows]


def stage_of(retrievers: int, pool: int = 8) -> RetrievalStage:
    """Return a stage with random weights."""
    return RetrievalStage(Signals(RANDOM[retrievers].statistics, RANDOM[retrievers].weights, pool))


def reference(stage: RetrievalStage, rows: list[NDArray[np.float32]], history: Any, masked: Any, k: int) -> list[int]:
    """Return all items outside ``masked`` in the stage's order, by Python's sort.

    First comes the pool by its weighted sums, then everything else by the first retriever; ties go to the smaller
    number.
    """
    allowed = [item for item in range(1, ITEMS + 1) if item not in set(masked)]
    assert stage.signals is not None
    pool: set[int] = set()
    for row in rows:
        pool |= set(sorted(allowed, key=lambda item, row=row: (-row[item], item))[: max(stage.signals.pool, k)])
    some = np.array(sorted(pool), np.int32)
    logits = np.stack([row[some] for row in rows], axis=1)
    sums = dict(zip(some.tolist(), stage.signals.scores(history, some, logits).astype(np.float32), strict=True))
    first = sorted(pool, key=lambda item: (-sums[item], item))
    return first + sorted(set(allowed) - pool, key=lambda item: (-rows[0][item], item))


# --- without signals


@given(seeds, items_of, st.integers(1, 25))
def test_without_signals_the_retrievers_best_have_their_log_probabilities(seed, masked, k):
    """The items are those of top_candidates, and the scores the logarithm of the softmax of their logits."""
    (row,) = random_rows(seed)
    found = RetrievalStage().candidates([row.copy()], NOTHING, masked, k)
    expected = top_candidates(row, masked, k)
    assert found.items.tolist() == expected.items.tolist()
    assert found.ranks.tolist() == expected.ranks.tolist()
    np.testing.assert_allclose(found.scores, log_softmax(expected.scores), atol=1e-6)


def test_given_items_without_signals_by_hand():
    """Items 3 and 1 have logits ln 1 and ln 3, so 1/4 and 3/4; item 9 is outside the vocabulary and comes last."""
    row = np.array([9, np.log(3), 7, 0], np.float32)
    found = RetrievalStage().given([row], NOTHING, np.array([9, 3, 1], np.int32))
    assert (found.items.tolist(), found.ranks.tolist()) == ([1, 3, 9], [1, 2, 0])
    np.testing.assert_allclose(np.exp(found.scores), [0.75, 0.25, 0], atol=1e-6)


# --- with signals


@settings(deadline=None)
@given(seeds, items_of, st.integers(1, 25), st.sampled_from([5, 8, ITEMS]))
def test_weight_on_the_retriever_alone_keeps_its_order(seed, masked, k, pool):
    """With weight 1 for the retriever and 0 for every signal, the stage is the one without signals, ties included."""
    (row,) = random_rows(seed)
    signals = Signals(STATISTICS, weights((1.0,)), pool)
    found = RetrievalStage(signals).candidates([row.copy()], np.array([3, 4], np.int32), masked, k)
    expected = RetrievalStage().candidates([row.copy()], NOTHING, masked, k)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@settings(deadline=None)
@given(seeds, items_of, items_of, st.integers(1, 25), st.integers(1, 2), st.sampled_from([1, 8, 30, 500]))
def test_the_order_is_that_of_the_weighted_sums_over_the_pool(seed, history, excluded, k, retrievers, pool):
    """The reference builds the pool and sorts it in Python; log-probabilities are the softmax of the k best sums.

    Masked items never appear, and the exponentials of the scores sum to 1.
    """
    stage, rows = stage_of(retrievers, pool), random_rows(seed, retrievers)
    masked = np.concatenate((history, excluded))
    found = stage.candidates(copies(rows), history, masked, k)
    expected = reference(stage, rows, history, masked.tolist(), k)[:k]
    assert found.items.tolist() == expected
    assert found.ranks.tolist() == list(range(1, len(expected) + 1))
    assert not set(found.items.tolist()) & {0, *masked.tolist()}
    assert (np.diff(found.scores) <= 0).all()
    assert np.exp(found.scores.astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)
    assert stage.signals is not None
    logits = np.stack([row[found.items] for row in rows], axis=1)
    np.testing.assert_allclose(found.scores, log_softmax(stage.signals.scores(history, found.items, logits)), atol=1e-5)


def test_signals_reorder_the_pool_and_nothing_else_by_hand():
    """Popularity alone orders the best three of the retriever; the most popular item of all is not among them."""
    popularity = np.array([9, 1, 3, 2, 8, 7], np.float32)
    statistics = replace(STATISTICS, popularity=popularity)
    signals = Signals(statistics, weights((0.0,), popularity=1.0), 3)
    row = np.array([0, 5, 4, 3, 2, 1], np.float32)
    ordered = RetrievalStage(signals).ordered([row.copy()], NOTHING, NOTHING, 2)
    assert (ordered.items.tolist(), ordered.scores.tolist(), ordered.ranks.tolist()) == (
        [2, 3, 1],
        [3, 2, 1],
        [1, 2, 3],
    )
    found = RetrievalStage(signals).candidates([row.copy()], NOTHING, NOTHING, 2)
    assert found.items.tolist() == [2, 3]
    np.testing.assert_allclose(np.exp(found.scores), [1 / (1 + np.exp(-1)), 1 / (1 + np.e)], rtol=1e-6)


@pytest.mark.parametrize("signals", [None, Signals(STATISTICS, weights((1.0,)), 30)])
def test_ties_go_to_the_smaller_number(signals):
    """With equal logits, and with equal sums of logits and signals, items come in the order of their numbers."""
    row = np.zeros(ITEMS + 1, np.float32)
    found = RetrievalStage(signals).candidates([row], NOTHING, np.array([1, 4], np.int32), 6)
    assert found.items.tolist() == [2, 3, 5, 6, 7, 8]
    assert len(set(found.scores.tolist())) == 1


def test_everything_masked_leaves_nothing():
    """A user who has seen the whole catalogue gets an empty list from every stage, without a warning."""
    everything = np.arange(1, ITEMS + 1, dtype=np.int32)
    for stage, retrievers in ((RetrievalStage(), 1), (stage_of(1), 1), (stage_of(2), 2)):
        found = stage.candidates(random_rows(0, retrievers), everything, everything, 20)
        assert [len(column) for column in found[:3]] == [0, 0, 0]


def test_two_retrievers_fill_one_pool():
    """By hand: the best two of one are 1 and 2, of the other 4 and 2, of which 4 is masked and 5 takes its place."""
    rows = [np.array([9, 5, 4, 3, 2, 1], np.float32), np.array([9, 1, 4, 2, 5, 3], np.float32)]
    items, logits = pool_of(rows, np.array([4], np.int32), 2)
    assert items.tolist() == [1, 2, 5]
    assert logits.tolist() == [[5, 1], [4, 4], [1, 3]]
    assert items.dtype == np.int32


@given(seeds, items_of, st.integers(1, 60))
def test_the_pool_is_the_union_of_the_best(seed, masked, size):
    """The reference is the union of each retriever's list; logits are those of both retrievers for every item."""
    rows = random_rows(seed, 2)
    items, logits = pool_of(copies(rows), masked, size)
    best = [top_candidates(row.copy(), masked, size).items.tolist() for row in rows]
    assert items.tolist() == sorted({*best[0], *best[1]})
    np.testing.assert_array_equal(logits, np.stack([row[items] for row in rows], axis=1))


# --- the caller's own items


@settings(deadline=None)
@given(
    seeds,
    items_of,
    st.lists(st.integers(-5, -1) | st.integers(1, ITEMS + 10), unique=True, max_size=20),
    st.integers(0, 2),
)
def test_given_items_come_in_the_stages_order(seed, history, items, retrievers):
    """Known items are in the order of their weighted sums, ties by number; unknown ones, among them texts with negative
    numbers, come last, with rank 0.

    The history masks nothing, and the exponentials of the known items' scores sum to 1.
    """
    stage = stage_of(retrievers) if retrievers else RetrievalStage()
    rows, asked = random_rows(seed, max(retrievers, 1)), np.array(items, np.int32)
    found = stage.given(copies(rows), history, asked)
    known = [item for item in sorted(items) if 0 < item <= ITEMS]
    if stage.signals is None:
        sums = [float(rows[0][item]) for item in known]
    else:
        logits = np.stack([row[known] for row in rows], axis=1)
        sums = stage.signals.scores(history, np.array(known, np.int32), logits).astype(np.float32).tolist()
    score_of = dict(zip(known, sums, strict=True))
    ordered = sorted(known, key=lambda item: (-score_of[item], item))
    assert found.items.tolist() == [*ordered, *(item for item in items if item not in known)]
    assert found.ranks.tolist() == [*range(1, len(known) + 1), *[0] * (len(items) - len(known))]
    assert not np.isfinite(found.scores[len(known) :]).any()
    if known:
        np.testing.assert_allclose(found.scores[: len(known)], log_softmax(np.array(sorted(sums)[::-1])), atol=1e-5)


@settings(deadline=None)
@given(seeds, items_of, st.integers(1, 2))
def test_given_the_retrieved_items_their_order_is_kept(seed, history, retrievers):
    """A caller who sends the stage's own candidates in any order gets the same list, with the same scores and ranks."""
    stage, rows = stage_of(retrievers), random_rows(seed, retrievers)
    retrieved = stage.candidates(copies(rows), history, history, 20)
    shuffled = np.random.default_rng(seed).permutation(retrieved.items)
    found = stage.given(copies(rows), history, shuffled)
    for one, other in zip(found, retrieved, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_differs_beyond_32_bits_is_a_tie_everywhere():
    """Scores are handed on in 32 bits, in which 1e4 and 1e4 + 1e-7 are equal: the smaller number comes first.

    Retrieved and given items would otherwise come in different orders.
    """
    popularity = np.zeros(ITEMS + 1, np.float32)
    popularity[9] = 1.0
    statistics = replace(STATISTICS, popularity=popularity)
    stage = RetrievalStage(Signals(statistics, weights((1.0,), popularity=1e-7), 8))
    row = np.zeros(ITEMS + 1, np.float32)
    row[[3, 9]] = 1e4
    assert stage.candidates([row.copy()], NOTHING, NOTHING, 2).items.tolist() == [3, 9]
    assert stage.given([row.copy()], NOTHING, np.array([9, 3], np.int32)).items.tolist() == [3, 9]


# --- the rank of one item


@settings(deadline=None)
@given(seeds, items_of, st.integers(1, 2), st.integers(1, 25))
def test_the_rank_of_every_item_is_its_place_in_the_full_list(seed, history, retrievers, k):
    """The reference is the full list: the pool in the stage's order, then the rest by the first retriever.

    A masked item has rank 0.
    """
    stage, rows = stage_of(retrievers), random_rows(seed, retrievers)
    places = {item: place for place, item in enumerate(reference(stage, rows, history, history.tolist(), k), start=1)}
    masked = copies(rows)
    ordered = stage.ordered(masked, history, history, k)
    found = {item: rank_in(ordered, masked[0], item) for item in range(1, ITEMS + 1)}
    assert found == {item: places.get(item, 0) for item in found}


@given(seeds, items_of)
def test_the_rank_without_signals_is_that_among_all_items(seed, history):
    """The reference is the list of all items outside the history: candidates and the rest are in one order."""
    (row,) = random_rows(seed)
    everything = top_candidates(row.copy(), history, ITEMS).items.tolist()
    ordered = RetrievalStage().ordered([row], history, history, 20)
    found = {item: rank_in(ordered, row, item) for item in range(1, ITEMS + 1)}
    assert found == {item: everything.index(item) + 1 if item in everything else 0 for item in found}
