"""Samples the examples that a ranker is trained on: a part of a sequence, the item that came next, and candidates."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.ranker.options import Order
from models.retriever.batches import Items
from models.retriever.candidates import Candidates
from preprocessing.errors import InputError

POSITIONS_AT_ONCE = 512
"""Number of positions whose candidates are made together, because the retriever scores in batches."""


@dataclass(frozen=True)
class Example:
    """One ranking task: a history, its candidates, and which of them came next."""

    history: Items
    """Item numbers, oldest first."""
    candidates: Items
    """Item numbers in the order of their letters."""
    truth: int
    """Position (from 0) of the true item among the candidates."""
    scores: NDArray[np.float32]
    """The candidates' log-probabilities by the retrieval stage [k]; all 0 for candidates that were not retrieved."""


class Position(NamedTuple):
    """A position in a user's training sequence."""

    user: int
    """Index of the user, from 0."""
    history: Items
    """The preceding items, oldest first; at least one."""
    target: int
    """The item that came next."""


Pools = Callable[[Sequence[Position], np.random.Generator], list[list[Example]]]
"""Function that returns the examples of each position, which differ only in their candidates; the list of a position
that it cannot use is empty."""


def sample_examples(
    training: Sequence[Items],
    pools: Pools,
    *,
    count: int | None = None,
    per_user: int | None = None,
    seed: int | Sequence[int],
) -> list[Example]:
    """Return examples at random positions of the training sequences, with candidates from ``pools``.

    Every position after at least one item is drawn at most once (paper, section 4.0.4). ``pools`` receives the history
    and the target, but no later item: negatives without a user's later items would reveal those items.

    Args:
        training: training part of each user's sequence, oldest first.
        pools: function that returns the examples of each position.
        count: maximum number of examples; no limit if absent.
        per_user: maximum number of examples for one user, so that long sequences do not dominate; no limit if absent.
        seed: random seed of order and candidates, one number or several.

    Raises:
        InputError: no position gives an example.
    """
    rng = np.random.default_rng(seed)
    ends = np.cumsum([max(len(sequence) - 1, 0) for sequence in training])
    if len(ends) == 0 or ends[-1] == 0:
        raise InputError("no user has 2 items to train on: provide data with longer sequences")
    most = int(ends[-1]) if count is None else count
    of_user: Counter[int] = Counter()

    def free(user: int) -> bool:
        return per_user is None or of_user[user] < per_user

    examples: list[Example] = []
    order = rng.permutation(int(ends[-1]))
    for start in range(0, len(order), POSITIONS_AT_ONCE):
        chunk = [_position(training, ends, int(number)) for number in order[start : start + POSITIONS_AT_ONCE]]
        chunk = [position for position in chunk if free(position.user)]
        for position, made in zip(chunk, pools(chunk, rng), strict=True):
            if made and free(position.user):
                kept = made if per_user is None else made[: per_user - of_user[position.user]]
                of_user[position.user] += len(kept)
                examples += kept
        if count is not None and len(examples) >= most:
            return examples[:most]
    if not examples:
        raise InputError(
            f"none of {len(order)} training positions gives an example, because the retriever's candidates never"
            " contain the next item: train the retriever longer, or train the ranker with random negatives"
        )
    return examples


def _position(training: Sequence[Items], ends: NDArray[np.int64], number: int) -> Position:
    """Return a position by its number, counted over all users' sequences from their second item on."""
    user = int(np.searchsorted(ends, number, side="right"))
    place = len(training[user]) - int(ends[user] - number)
    return Position(user, training[user][:place], int(training[user][place]))


@dataclass(frozen=True)
class RandomPools:
    """Pools of the target and random items of the catalogue outside the history, shuffled."""

    items: int
    """Size of the catalogue; item numbers count from 1."""
    candidates: int
    """Number of candidates in an example, including the target; fewer if the catalogue is too small."""
    pools: int = 1
    """Number of examples for one position, each with its own candidates."""
    counts: Sequence[int] | None = None
    """Number of occurrences of each item in the training sequences, to which its probability of being drawn is
    proportional; if absent, all items are equally probable, as in the paper."""

    def __call__(self, positions: Sequence[Position], rng: np.random.Generator) -> list[list[Example]]:
        """Return the examples of each position; see :data:`Pools`."""
        return [[self._example(position, rng) for _ in range(self.pools)] for position in positions]

    def _example(self, position: Position, rng: np.random.Generator) -> Example:
        taken = np.append(position.history, position.target)
        drawn = draw_negatives(self.items, taken, self.candidates - 1, rng, self.counts)
        shuffled = rng.permutation(np.append(drawn, position.target)).astype(np.int32)
        return _example(position.history, shuffled, position.target)


@dataclass(frozen=True)
class RetrievedPools:
    """Pools of retrieved candidates, as in serving, for the positions whose target the retriever found."""

    lists: Callable[[Sequence[Position]], list[Candidates]]
    """Function that returns the retriever's candidates of each position. The retriever must not have been trained on
    the position's user, whose target it would rank too well (:mod:`models.ranker.examples.crossfit`)."""
    order: Order = "retriever"
    """Order of the candidates: with ``retriever`` the letters carry the retriever's ranking, with ``shuffled`` they
    carry no information."""
    pools: int = 1
    """Number of ``shuffled`` examples for one position, each in a random order of its own."""
    drawn: int | None = None
    """Number of candidates of an example, the target and random others of the list; the whole list if absent."""

    def __call__(self, positions: Sequence[Position], rng: np.random.Generator) -> list[list[Example]]:
        """Return the examples of each position; see :data:`Pools`."""
        made: list[list[Example]] = []
        for position, listed in zip(positions, self.lists(positions), strict=True):
            orders = [np.arange(len(listed.items))] if position.target in listed.items else []
            if orders and self.order == "shuffled":
                truth = int(np.flatnonzero(listed.items == position.target)[0])
                orders = [rng.permutation(self._places(len(listed.items), truth, rng)) for _ in range(self.pools)]
            made.append(
                [
                    _example(position.history, listed.items[order], position.target, listed.scores[order])
                    for order in orders
                ]
            )
        return made

    def _places(self, length: int, truth: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Return the places of an example's candidates in a list of this length."""
        everything = np.arange(length)
        if self.drawn is None or self.drawn >= length:
            return everything
        return np.append(rng.choice(np.delete(everything, truth), self.drawn - 1, replace=False), truth)


def _example(history: Items, items: Items, target: int, scores: NDArray[np.float32] | None = None) -> Example:
    unknown = np.zeros(len(items), np.float32)
    place = int(np.flatnonzero(items == target)[0])
    return Example(history, items, place, unknown if scores is None else scores)


def draw_negatives(
    items: int, taken: Items, count: int, rng: np.random.Generator, counts: Sequence[int] | None = None
) -> Items:
    """Return ``count`` distinct random item numbers outside ``taken``, or all such items if there are fewer.

    Args:
        items: size of the catalogue; item numbers count from 1.
        taken: item numbers to leave out.
        count: number of items to draw.
        rng: random generator.
        counts: numbers [items] to which the items' probabilities are proportional; if absent, they are equal.
    """
    shares = None if counts is None else np.asarray(counts) / np.sum(counts)
    drawn: list[int] = []
    seen = set(taken.tolist())
    for _ in range(8):  # enough unless most of the catalogue is taken
        size = 2 * count + 8
        some = rng.integers(1, items + 1, size) if shares is None else rng.choice(items, size, p=shares) + 1
        for item in some.tolist():
            if item not in seen and len(drawn) < count:
                seen.add(item)
                drawn.append(item)
        if len(drawn) == count:
            return np.asarray(drawn, dtype=np.int32)
    rest = rng.permutation(np.setdiff1d(np.arange(1, items + 1), np.fromiter(seen, np.int32)))
    return np.asarray([*drawn, *rest[: count - len(drawn)]], dtype=np.int32)
