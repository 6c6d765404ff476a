"""Examples a ranker learns from: parts of the training sequences, and candidates around the item that came next."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from models.ranker.verbalizer import LETTERS
from preprocessing.errors import InputError

Items = NDArray[np.int32]
Negatives = Literal["random", "retriever"]


@dataclass(frozen=True)
class Example:
    """One ranking: a history, its candidates, and which of them came next."""

    history: Items
    """Oldest first."""
    candidates: Items
    """In the order of their letters."""
    truth: int
    """Place (from 0) of the true item among the candidates."""


def sample_examples(
    training: Sequence[Items], pool: Items, *, count: int | None, seed: int, candidates: int = len(LETTERS)
) -> list[Example]:
    """Prefixes of training sequences in random order, each with its last item as the truth among drawn negatives.

    Every prefix of at least 2 items is one possible example (paper, section 4.0.4). Negatives are distinct, and never
    an item of the prefix; a user's later items may be among them, since leaving those out would give them away.

    Args:
        training: the training part of each user's sequence, oldest first.
        pool: what negatives are drawn from; an item that stands in it several times is drawn as much more often. The
            catalogue gives the paper's uniform negatives, the retriever's lists give negatives like those it proposes.
        count: how many examples, without repetition; all there are if absent.
        seed: of the sampling.
        candidates: candidates of one example; fewer where the pool has no more.

    Raises:
        InputError: no sequence has 2 items.
    """
    rng = np.random.default_rng(seed)
    ends = np.cumsum([max(len(sequence) - 1, 0) for sequence in training])
    if len(ends) == 0 or ends[-1] == 0:
        raise InputError("no user has 2 items to train on: the ranker needs longer sequences")
    total = int(ends[-1])
    chosen = rng.permutation(total)[: total if count is None else count]
    examples = []
    for number in chosen:
        user = int(np.searchsorted(ends, number, side="right"))
        target = len(training[user]) - int(ends[user] - number)
        prefix = training[user][: target + 1]
        drawn = draw_negatives(pool, prefix, candidates - 1, rng)
        mixed = rng.permutation(np.append(drawn, prefix[-1]))
        truth = int(np.flatnonzero(mixed == prefix[-1])[0])
        examples.append(Example(prefix[:-1], mixed.astype(np.int32), truth))
    return examples


def draw_negatives(pool: Items, taken: Items, count: int, rng: np.random.Generator) -> Items:
    """Distinct random items of ``pool`` without those in ``taken``: ``count``, or all there are."""
    drawn: list[int] = []
    seen = set(taken.tolist())
    for _ in range(8):  # enough unless most of the pool is taken
        for item in rng.choice(pool, 2 * count + 8).tolist():
            if item not in seen and len(drawn) < count:
                seen.add(item)
                drawn.append(item)
        if len(drawn) == count:
            return np.asarray(drawn, dtype=np.int32)
    rest = rng.permutation(np.setdiff1d(pool, np.fromiter(seen, np.int32)))
    return np.asarray([*drawn, *rest[: count - len(drawn)]], dtype=np.int32)
