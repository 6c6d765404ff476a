"""Examples a ranker learns from: parts of the training sequences, and candidates around the item that came next."""

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
"""Positions whose candidates are made together: the retriever scores in batches."""


@dataclass(frozen=True)
class Example:
    """One ranking: a history, its candidates, and which of them came next."""

    history: Items
    """Oldest first."""
    candidates: Items
    """In the order of their letters."""
    truth: int
    """Place (from 0) of the true item among the candidates."""
    scores: NDArray[np.float32]
    """The retriever's logits [k] of the candidates; all the same where it was not asked."""


class Position(NamedTuple):
    """A place in a user's training sequence."""

    user: int
    history: Items
    """What came before, oldest first: at least one item."""
    target: int
    """The item that came next."""


Pools = Callable[[Sequence[Position], np.random.Generator], list[list[Example]]]
"""Makes the examples of each position, which differ in their candidates only; none where it has no use for one."""


def sample_examples(
    training: Sequence[Items],
    pools: Pools,
    *,
    count: int | None = None,
    per_user: int | None = None,
    seed: int | Sequence[int],
) -> list[Example]:
    """Positions of training sequences in random order, each with the candidates that ``pools`` puts around its target.

    Every position behind at least one item is possible, once (paper, section 4.0.4). What makes the candidates sees
    the history and the target, never a later item: leaving a user's later items out of the negatives would give them
    away.

    Args:
        training: the training part of each user's sequence, oldest first.
        pools: makes the candidates.
        count: how many examples at most; all there are if absent.
        per_user: how many examples of one user at most, so that long sequences don't dominate; no limit if absent.
        seed: of the order and of the candidates, one number or several.

    Raises:
        InputError: there is not one example.
    """
    rng = np.random.default_rng(seed)
    ends = np.cumsum([max(len(sequence) - 1, 0) for sequence in training])
    if len(ends) == 0 or ends[-1] == 0:
        raise InputError("no user has 2 items to train on: the ranker needs longer sequences")
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
            f"none of {len(order)} training positions gives an example: the retriever has the next item nowhere among"
            " its candidates. Train it longer, or train the ranker with random negatives"
        )
    return examples


def _position(training: Sequence[Items], ends: NDArray[np.int64], number: int) -> Position:
    """The position of that number, counted over all users' sequences from their second item on."""
    user = int(np.searchsorted(ends, number, side="right"))
    place = len(training[user]) - int(ends[user] - number)
    return Position(user, training[user][:place], int(training[user][place]))


@dataclass(frozen=True)
class RandomPools:
    """The target among items drawn from the catalogue without the history, shuffled."""

    items: int
    """Size of the catalogue; item numbers count from 1."""
    candidates: int
    """Of one example, the target included; fewer where the catalogue has no more."""
    pools: int = 1
    """Examples of one position, each with candidates of its own."""
    counts: Sequence[int] | None = None
    """How often each item stands in the training sequences, which its chance to be drawn is proportional to; all have
    the same, the paper's way, if absent."""

    def __call__(self, positions: Sequence[Position], rng: np.random.Generator) -> list[list[Example]]:
        """See :data:`Pools`."""
        return [[self._example(position, rng) for _ in range(self.pools)] for position in positions]

    def _example(self, position: Position, rng: np.random.Generator) -> Example:
        taken = np.append(position.history, position.target)
        drawn = draw_negatives(self.items, taken, self.candidates - 1, rng, self.counts)
        shuffled = rng.permutation(np.append(drawn, position.target)).astype(np.int32)
        return _example(position.history, shuffled, position.target)


@dataclass(frozen=True)
class RetrievedPools:
    """The retriever's own list, for the positions whose target is in it: what the ranker will meet when it serves."""

    lists: Callable[[Sequence[Position]], list[Candidates]]
    """The retriever's candidates of each position. It must not have learned from the position's user, or
    it ranks the target better than it ever will again (:mod:`models.ranker.examples.crossfit`)."""
    order: Order = "retriever"
    """With the ``retriever`` order the letter carries the retriever's opinion; ``shuffled`` it carries none."""
    pools: int = 1
    """Examples of one position, each in an order of its own."""

    def __call__(self, positions: Sequence[Position], rng: np.random.Generator) -> list[list[Example]]:
        """See :data:`Pools`."""
        made: list[list[Example]] = []
        for position, listed in zip(positions, self.lists(positions), strict=True):
            places = np.arange(len(listed.items))
            orders = [] if position.target not in listed.items else [places]
            if orders and self.order == "shuffled":
                orders = [rng.permutation(places) for _ in range(self.pools)]
            made.append(
                [
                    _example(position.history, listed.items[order], position.target, listed.scores[order])
                    for order in orders
                ]
            )
        return made


def _example(history: Items, items: Items, target: int, scores: NDArray[np.float32] | None = None) -> Example:
    unknown = np.zeros(len(items), np.float32)
    place = int(np.flatnonzero(items == target)[0])
    return Example(history, items, place, unknown if scores is None else scores)


def draw_negatives(
    items: int, taken: Items, count: int, rng: np.random.Generator, counts: Sequence[int] | None = None
) -> Items:
    """Distinct random item numbers from 1 to ``items`` without those in ``taken``: ``count``, or all there are.

    Args:
        items: size of the catalogue.
        taken: item numbers to leave out.
        count: how many to draw.
        rng: of the draw.
        counts: [items] what each item's chance is proportional to; all have the same if absent.
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
