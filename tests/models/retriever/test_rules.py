"""The rules of a policy, against a plain loop over the items that a sort puts in order."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from retrieval import log_softmax, random_signals

from models.retriever.candidates import Candidates
from models.retriever.inference.onnx_retriever import Graph, OnnxRetriever
from models.retriever.rules import Rules, select, with_boosts, within_limit
from models.retriever.stage import RetrievalStage
from preprocessing.groups import Groups

ITEMS = 60
NAMES = ("Book", "Film", "Game", "Music")
NOTHING = np.empty(0, np.int32)
STAGES = {
    "scores": RetrievalStage(),
    "signals of one": RetrievalStage(random_signals(ITEMS, 1, pool=8)),
    "signals of two": RetrievalStage(random_signals(ITEMS, 2, pool=8)),
}


def rows_of(stage: RetrievalStage, seed: int) -> list[NDArray[np.float32]]:
    """Return rows of logits with ties; the padding's is the highest, so that it shows if it is not masked."""
    rng = np.random.default_rng(seed)
    two = stage.signals is not None and "second_retriever" in stage.signals.weights
    rows = [np.round(rng.normal(size=ITEMS + 1), 1).astype(np.float32) for _ in range(1 + two)]
    for row in rows:
        row[0] = 1e3
    return rows


def groups_of(seed: int) -> Groups:
    """Return groups of all items; about a fifth have none, and some names may be missing."""
    rng = np.random.default_rng(seed)
    return Groups.of([None if pick == 4 else NAMES[pick] for pick in rng.integers(0, 5, ITEMS).tolist()])


some_names = st.lists(st.sampled_from([*NAMES, "Radio"]), max_size=3).map(tuple)
rules = st.builds(
    Rules,
    max_per_group=st.none() | st.integers(1, 5),
    only_groups=st.none() | some_names,
    never_groups=some_names,
    masked=st.none() | st.integers(0, 5),
    boosts=st.dictionaries(st.integers(1, ITEMS + 3), st.floats(-3, 3).filter(bool), max_size=5),
)
histories = st.lists(st.integers(1, ITEMS), max_size=8).map(lambda items: np.array(items, np.int32))
seeds = st.integers(0, 1 << 30)


def naive(row: Any, groups: Groups, masked: Any, k: int, rules: Rules) -> list[int]:
    """Return the items that remain, best first: greedily by score, each group counted."""
    values, allowed = [None, *groups.values()], []
    for item in range(1, ITEMS + 1):
        group = values[item]
        wanted = rules.only_groups is None or group in rules.only_groups
        if item not in set(masked) and wanted and group not in rules.never_groups:
            allowed.append(item)
    total = {item: row[item] + np.float32(rules.boosts.get(item, 0.0)) for item in allowed}
    taken: list[int] = []
    counts: Counter[str] = Counter()
    for item in sorted(allowed, key=lambda item: (-total[item], item)):
        group = values[item]
        if len(taken) == k:
            break
        if group is None or rules.max_per_group is None or counts[group] < rules.max_per_group:
            taken.append(item)
            counts[str(group)] += 1
    return taken


@given(rules, histories, histories, st.integers(1, 30), seeds)
@settings(max_examples=100, deadline=None)
def test_the_best_items_that_the_rules_allow(rules, history, excluded, k, seed):
    """Without signals the items are those of a greedy loop over all of them; scores and boosts are apart."""
    stage, groups = STAGES["scores"], groups_of(seed)
    row = rows_of(stage, seed)[0]
    masked = np.concatenate((rules.masked_of(history), excluded))
    found = select(stage, [row.copy()], history, masked, k, rules, groups)
    assert found.items.tolist() == naive(row, groups, masked, k, rules)
    assert found.ranks.tolist() == list(range(1, len(found.items) + 1))
    if len(found.items):
        assert found.scores == pytest.approx(log_softmax(row[found.items]), abs=1e-5)
    boosts = [rules.boosts.get(item, 0.0) for item in found.items.tolist()]
    assert ([0.0] * len(boosts) if found.boosts is None else found.boosts) == pytest.approx(boosts, abs=1e-5)


@pytest.mark.parametrize("name", ["signals of one", "signals of two"])
@given(rules=rules, history=histories, k=st.integers(1, 30), seed=seeds)
@settings(max_examples=30, deadline=None)
def test_signals_keep_the_rules_too(name, rules, history, k, seed):
    """As many items as without signals, all of which the rules allow, in the order of scores and boosts."""
    stage, groups = STAGES[name], groups_of(seed)
    rows = rows_of(stage, seed)
    masked = rules.masked_of(history)
    found = select(stage, [row.copy() for row in rows], history, masked, k, rules, groups)
    assert len(found.items) == len(naive(rows[0], groups, masked, k, rules))
    assert set(found.items.tolist()) <= set(
        naive(rows[0], groups, masked, ITEMS, Rules(only_groups=rules.only_groups, never_groups=rules.never_groups))
    )
    counts = Counter(groups.codes[found.items].tolist())
    del counts[-1]
    assert max(counts.values(), default=0) <= (rules.max_per_group or ITEMS)
    total = found.scores if found.boosts is None else found.scores + found.boosts
    assert (np.diff(total) <= 1e-5).all()


@pytest.mark.parametrize("name", STAGES)
def test_rules_that_say_nothing_change_nothing(name):
    """Bit for bit the candidates of the stage itself."""
    stage, history = STAGES[name], np.array([3, 1, 4], np.int32)
    rows = rows_of(stage, 0)
    found = select(stage, [row.copy() for row in rows], history, history, 20, Rules(), groups_of(0))
    expected = stage.candidates(rows, history, history, 20)
    for one, other in zip(found[:3], expected[:3], strict=True):
        assert one.tobytes() == other.tobytes()
    assert found.boosts is None


@given(st.lists(st.integers(-1, 3), max_size=40), st.integers(1, 4))
def test_a_limit_is_that_of_a_counting_loop(codes, limit):
    """Item by item: an item without a group remains, and one of a group while fewer of it did."""
    counts: Counter[int] = Counter()
    expected = []
    for code in codes:
        expected.append(code < 0 or counts[code] < limit)
        counts[code] += 1
    assert within_limit(np.array(codes, np.int32), limit).tolist() == expected


def test_a_boost_lifts_an_item_from_outside_the_pool():
    """Item 60 is the worst of all by score; with signals and a pool of 8, a factor of e^100 makes it the first."""
    stage = STAGES["signals of two"]
    rows = [np.linspace(5, -5, ITEMS + 1).astype(np.float32) for _ in range(2)]
    found = select(stage, rows, NOTHING, NOTHING, 20, Rules(boosts={ITEMS: 100.0}), Groups.of([]))
    assert found.items[0] == ITEMS
    assert found.boosts.tolist() == [100.0] + [0.0] * (len(found.items) - 1)
    assert found.probabilities()[0] == 1


def test_a_boost_multiplies_the_odds_of_an_answer():
    """By hand: log-probabilities of 1, 2 and 5 eighths; doubling the second makes 1, 4 and 5 tenths of them."""
    scores = np.log(np.array([1, 2, 5]) / 8).astype(np.float32)
    candidates = Candidates(np.array([7, 8, 9], np.int32), scores, np.array([3, 2, 1], np.int32))
    boosted = candidates._replace(boosts=np.array([0, math.log(2), 0], np.float32))
    assert boosted.probabilities() == pytest.approx([0.1, 0.4, 0.5])
    assert candidates.probabilities() == pytest.approx([0.125, 0.25, 0.625])


def test_boosts_of_the_callers_candidates():
    """By hand: the second passes the first, an unknown one stays last whatever its boost, and a text has a number below
    0.
    """
    given = Candidates(
        np.array([5, 3, -1], np.int32), np.array([-0.2, -1.7, -np.inf], np.float32), np.array([1, 2, 0], np.int32)
    )
    found = with_boosts(given, Rules(boosts={3: 2.0, -1: 9.0}))
    assert found.items.tolist() == [3, 5, -1]
    assert found.ranks.tolist() == [1, 2, 0]
    assert found.boosts.tolist() == [2.0, 0.0, 9.0]
    assert found.scores.tolist() == given.scores[[1, 0, 2]].tolist()
    assert with_boosts(given, Rules(boosts={4: 1.0})) is given


class Session:
    """Scores five items with 5, 4, 3, 2 and 1."""

    def run(self, outputs, feeds):
        return [np.array([[9, 5, 4, 3, 2, 1]], np.float32)]


@pytest.mark.parametrize(
    ("masked", "expected"), [(None, [5]), (0, [1, 2, 3, 4, 5]), (1, [1, 2, 4, 5]), (2, [1, 4, 5]), (9, [5])]
)
def test_repeats(masked, expected):
    """The history is 1, 2, 3, 4, 2, 3: its last N entries are masked; None masks all, and 0 nothing."""
    retriever = OnnxRetriever([Graph(Session(), 10)], RetrievalStage())
    history = np.array([1, 2, 3, 4, 2, 3], np.int32)
    found = retriever.candidates_by(Rules(masked=masked), Groups.of([]), history, NOTHING)
    assert found.items.tolist() == expected
