"""The rules of a policy in the retrieval stage: which items are masked, how many of a group remain, and boosts.

They act before the candidates are cut from the stage's order, so that as many remain as there can be.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.retriever.candidates import Candidates, best_first, in_vocabulary
from models.retriever.stage import RetrievalStage, Row, logits_of, pool_of
from preprocessing.groups import Groups

GROWTH = 4
"""Factor by which the pool grows when too few of its items remain."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """A policy in item numbers, for one request."""

    max_per_group: int | None = None
    """Maximum number of candidates of one group; None for no limit. Items without a group are not limited."""
    only_groups: tuple[str, ...] | None = None
    """Groups of which all candidates are; None for all items, those without a group included."""
    never_groups: tuple[str, ...] = ()
    """Groups of which no candidate is."""
    masked: int | None = None
    """Number of most recent items of the history that are masked; None for all of them."""
    boosts: Mapping[int, float] = field(default_factory=dict)
    """Logarithm of the factor for items by number, without zeros."""

    @property
    def only_mask(self) -> bool:
        """Whether these rules change nothing but which items of the history are masked."""
        return self.max_per_group is None and self.only_groups is None and not self.never_groups and not self.boosts

    def masked_of(self, history: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the items of a history that must not be returned."""
        return history if self.masked is None else history[max(len(history) - self.masked, 0) :]

    def outside(self, groups: Groups) -> NDArray[np.int64]:
        """Return the items that their group excludes, in ascending order."""
        wrong = np.zeros(len(groups.codes), np.bool_)
        if self.only_groups is not None:
            wrong |= ~np.isin(groups.codes, groups.codes_of(self.only_groups))
        if self.never_groups:
            wrong |= np.isin(groups.codes, groups.codes_of(self.never_groups))
        return np.flatnonzero(wrong)

    def boosts_of(self, items: NDArray[np.int32]) -> NDArray[np.float32] | None:
        """Return what is added to the log-probabilities of items [k]; None if it is nothing for all of them."""
        if not self.boosts:
            return None
        boosts = np.array([self.boosts.get(item, 0.0) for item in items.tolist()], np.float32)
        return boosts if boosts.any() else None


class Selection(NamedTuple):
    """Rules, and the groups that they name."""

    rules: Rules
    groups: Groups


def within_limit(codes: NDArray[np.int32], limit: int) -> NDArray[np.bool_]:
    """Return which items remain if at most ``limit`` of each group do, the first ones.

    Args:
        codes: groups of the items, best item first [k]; -1 for an item without a group, which always remains.
        limit: maximum number of items of a group.
    """
    order = np.argsort(codes, kind="stable")
    grouped = codes[order]
    places = np.empty(len(codes), np.int64)
    places[order] = np.arange(len(codes)) - np.searchsorted(grouped, grouped)
    remaining: NDArray[np.bool_] = (places < limit) | (codes < 0)
    return remaining


def select(
    stage: RetrievalStage,
    rows: Sequence[Row],
    history: NDArray[np.int32],
    masked: NDArray[np.int32],
    k: int,
    rules: Rules,
    groups: Groups,
) -> Candidates:
    """Return the best ``k`` items that the rules allow, in the stage's order after boosts.

    The scores are those without boosts, which stand beside them.

    Args:
        stage: orders the items.
        rows: the scores of each retriever; masked items are set to -inf in place.
        history: item numbers, oldest first.
        masked: numbers of items that must not be returned, whatever their group.
        k: number of items; fewer are returned if the rules allow no more.
        rules: see :class:`Rules`.
        groups: those of the catalogue.
    """
    excluded = rules.outside(groups)
    whole = np.concatenate((masked, excluded)).astype(np.int32)
    whole = whole[whole < len(rows[0])]
    size = k if stage.signals is None else max(stage.signals.pool, k)
    while True:
        found = _ordered(stage, rows, history, whole, size, rules)
        if rules.max_per_group is None:
            return found.first(k)
        kept = within_limit(groups.codes[found.items], rules.max_per_group)
        if size >= len(rows[0]) or kept.sum() >= min(k, _reachable(rows[0], groups, rules.max_per_group)):
            return _renumbered(found, np.flatnonzero(kept)).first(k)
        size *= GROWTH


def with_boosts(candidates: Candidates, rules: Rules) -> Candidates:
    """Return the caller's candidates in the order after boosts; those that the retriever does not know stay last."""
    boosts = rules.boosts_of(candidates.items)
    if boosts is None:
        return candidates
    known = candidates.ranks > 0
    order = best_first(np.where(known, candidates.scores + boosts, -np.inf))
    ranks = np.where(known[order], np.arange(1, len(order) + 1), 0).astype(np.int32)
    return Candidates(candidates.items[order], candidates.scores[order], ranks, boosts[order])


def _ordered(
    stage: RetrievalStage,
    rows: Sequence[Row],
    history: NDArray[np.int32],
    masked: NDArray[np.int32],
    size: int,
    rules: Rules,
) -> Candidates:
    """Return the best ``size`` items, or with signals the pool of this size, in the order after boosts."""
    # Without signals an item may rise into the best ones because factors below 1 lower others.
    items, logits = pool_of(rows, masked, size if stage.signals else size + len(rules.boosts))
    if raised := [item for item, boost in rules.boosts.items() if boost > 0]:
        known = np.array(raised, np.int32)
        known = known[in_vocabulary(known, len(rows[0]))]
        items = np.union1d(items, known[np.isfinite(rows[0][known])]).astype(np.int32)
        logits = logits_of(rows, items)
    scores = logits[:, 0] if stage.signals is None else stage.signals.scores(history, items, logits).astype(np.float32)
    boosts = rules.boosts_of(items)
    found = Candidates(items, scores, np.empty(len(items), np.int32), boosts)
    order = best_first(scores if boosts is None else scores + boosts)
    return _renumbered(found, order[:size] if stage.signals is None else order)


def _renumbered(candidates: Candidates, places: NDArray[np.int64]) -> Candidates:
    """Return the candidates at some places, ranked in this order."""
    boosts = None if candidates.boosts is None else candidates.boosts[places]
    ranks = np.arange(1, len(places) + 1, dtype=np.int32)
    return Candidates(candidates.items[places], candidates.scores[places], ranks, boosts)


def _reachable(row: Row, groups: Groups, limit: int) -> int:
    """Return how many of the items that are not masked can be returned within the limit."""
    codes = groups.codes[: len(row)][np.isfinite(row)]
    grouped = codes[codes >= 0]
    return int(np.minimum(np.bincount(grouped), limit).sum()) + len(codes) - len(grouped)
