"""Examples a ranker learns from: parts of the training sequences, and candidates around the item that came next."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from preprocessing.errors import InputError

Items = NDArray[np.int32]
Negatives = Literal["random", "retriever"]
Order = Literal["shuffled", "retriever"]

EVIDENT_FROM = 0.1
"""Nearness of titles, from 0 to 1, above which it may be evident what came next: two common words are no likeness."""
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
            f"none of {len(order)} training positions gives an example: either the retriever has the next item nowhere"
            " among its candidates (train it longer, or train the ranker with random negatives), or no title gives the"
            " next item away (choose a preset without evident prompts)"
        )
    return examples


def _position(training: Sequence[Items], ends: NDArray[np.int64], number: int) -> Position:
    """The position of that number, counted over all users' sequences from their second item on."""
    user = int(np.searchsorted(ends, number, side="right"))
    place = len(training[user]) - int(ends[user] - number)
    return Position(user, training[user][:place], int(training[user][place]))


@dataclass(frozen=True)
class RandomPools:
    """The target among items drawn uniformly from the catalogue without the history, shuffled: the paper's way."""

    items: int
    """Size of the catalogue; item numbers count from 1."""
    candidates: int
    """Of one example, the target included; fewer where the catalogue has no more."""
    pools: int = 1
    """Examples of one position, each with candidates of its own."""

    def __call__(self, positions: Sequence[Position], rng: np.random.Generator) -> list[list[Example]]:
        """See :data:`Pools`."""
        return [[self._example(position, rng) for _ in range(self.pools)] for position in positions]

    def _example(self, position: Position, rng: np.random.Generator) -> Example:
        taken = np.append(position.history, position.target)
        drawn = draw_negatives(self.items, taken, self.candidates - 1, rng)
        return _shuffled(position.history, np.append(drawn, position.target), position.target, rng)


@dataclass(frozen=True)
class CopiedPools:
    """An item of the history itself among random ones, shuffled: nothing to know, only to bind a title to its letter.

    A small model that doesn't bind them yet learns nothing from real targets, which are seldom plain to see.
    """

    items: int
    """Size of the catalogue; item numbers count from 1."""
    candidates: int
    """Of one example, the target included; fewer where the catalogue has no more."""
    history: int
    """How many of the latest items a prompt shows: the target is one of them."""
    pools: int = 1
    """Examples of one position, each with a target and candidates of its own."""

    def __call__(self, positions: Sequence[Position], rng: np.random.Generator) -> list[list[Example]]:
        """See :data:`Pools`."""
        return [[self._example(position.history, rng) for _ in range(self.pools)] for position in positions]

    def _example(self, history: Items, rng: np.random.Generator) -> Example:
        target = int(rng.choice(history[-self.history :]))
        drawn = draw_negatives(self.items, history, self.candidates - 1, rng)
        return _shuffled(history, np.append(drawn, target), target, rng)


@dataclass(frozen=True)
class RetrievedPools:
    """The retriever's own list, for the positions whose target is in it: what the ranker will meet when it serves."""

    lists: Callable[[Sequence[Position]], list[Items]]
    """The retriever's candidates of each position, best first. It must not have learned from the position's user, or
    it ranks the target better than it ever will again (:mod:`models.ranker.crossfit`)."""
    order: Order = "retriever"
    """With the ``retriever`` order the letter carries the retriever's opinion; ``shuffled`` it carries none."""
    pools: int = 1
    """Examples of one position, each in an order of its own."""

    def __call__(self, positions: Sequence[Position], rng: np.random.Generator) -> list[list[Example]]:
        """See :data:`Pools`."""
        made: list[list[Example]] = []
        for position, items in zip(positions, self.lists(positions), strict=True):
            found = np.flatnonzero(items == position.target)
            if len(found) == 0:
                made.append([])
            elif self.order == "retriever":
                made.append([Example(position.history, items, int(found[0]))])
            else:
                made.append([_shuffled(position.history, items, position.target, rng) for _ in range(self.pools)])
        return made


@dataclass(frozen=True)
class EvidentPools:
    """The examples of other pools that the titles give away: no other candidate's is as near to one of the history.

    Behind those that copy they ask for a likeness instead of the same title. What is left for the real lists, where
    one target in six is evident, is how much to make of it.
    """

    pools: Pools
    """Makes the examples of which some are kept."""
    nearness: Callable[[Items, Items], NDArray[np.float64]]
    """How near the titles of items [a] and of others [b] are [a, b]: :class:`models.ranker.titles.TitleNearness`."""
    history: int
    """How many of the latest items a prompt shows."""

    def __call__(self, positions: Sequence[Position], rng: np.random.Generator) -> list[list[Example]]:
        """See :data:`Pools`."""
        return [[example for example in made if self._is_evident(example)] for made in self.pools(positions, rng)]

    def _is_evident(self, example: Example) -> bool:
        nearest = self.nearness(example.candidates, example.history[-self.history :]).max(axis=1)
        others = np.delete(nearest, example.truth)
        return bool(nearest[example.truth] > max(others.max(initial=0.0), EVIDENT_FROM))


def growing(examples: Sequence[Example], fewest: int, start: float = 0.0) -> list[Example]:
    """Examples with few of their candidates at first and all of them in the end, the target always among them.

    Among twenty a small model does not find out what the letters are for; among five it does in some hundred prompts.

    Args:
        examples: in the order of training.
        fewest: candidates of the first.
        start: share of the examples after which they get more.
    """
    most = max(len(example.candidates) for example in examples)
    sizes = np.interp(np.linspace(0, 1, len(examples)), [0, start, 1], [fewest, fewest, most]).astype(int)
    grown = []
    for example, size in zip(examples, sizes, strict=True):
        others = np.delete(np.arange(len(example.candidates)), example.truth)
        # From the whole list: among a retriever's first ones a target from far below would always be the last.
        others = others[np.linspace(0, len(others) - 1, size - 1).round().astype(int)]
        places = np.sort(np.append(others, example.truth))
        truth = int(np.flatnonzero(places == example.truth)[0])
        grown.append(Example(example.history, example.candidates[places], truth))
    return grown


def _shuffled(history: Items, items: Items, target: int, rng: np.random.Generator) -> Example:
    mixed = rng.permutation(items).astype(np.int32)
    return Example(history, mixed, int(np.flatnonzero(mixed == target)[0]))


def draw_negatives(items: int, taken: Items, count: int, rng: np.random.Generator) -> Items:
    """Distinct random item numbers from 1 to ``items`` without those in ``taken``: ``count``, or all there are."""
    drawn: list[int] = []
    seen = set(taken.tolist())
    for _ in range(8):  # enough unless most of the catalogue is taken
        for item in rng.integers(1, items + 1, 2 * count + 8).tolist():
            if item not in seen and len(drawn) < count:
                seen.add(item)
                drawn.append(item)
        if len(drawn) == count:
            return np.asarray(drawn, dtype=np.int32)
    rest = rng.permutation(np.setdiff1d(np.arange(1, items + 1), np.fromiter(seen, np.int32)))
    return np.asarray([*drawn, *rest[: count - len(drawn)]], dtype=np.int32)
