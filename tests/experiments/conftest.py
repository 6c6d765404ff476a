"""Made-up users for the tables of the rankers: every figure follows by hand."""

import numpy as np
import pytest

from experiments.kept import Lists, RankerLists, Scores

TRUTHS = {"validation": [0, 0, 2], "test": [0, 1, 2, 0]}


def made_up(truths: list[int]) -> Lists:
    """Return users with three candidates each.

    The retriever scores them 2, 1 and 0, they occur 1, 10 and 100 times in training, and the similarities of their
    titles are 0, 1 and .5. The last signal prefers the third candidate, and the others say nothing.
    """
    columns = (
        np.array([4, 5, 6], np.int32),
        np.array([2, 1, 0], np.float32),
        np.array([1, 10, 100], np.int32),
        np.array([0, 1, 0.5], np.float32),
        np.array([[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 2], [0, 0, 0, 0, 0, 3]], np.float32),
    )
    users = [f"user {number}" for number in range(len(truths))]
    return Lists(users, truths, *([column] * len(truths) for column in columns))


@pytest.fixture
def lists() -> RankerLists:
    """Three validation users, and the four of eight test users whose true item is among the candidates."""
    return RankerLists(8, made_up(TRUTHS["validation"]), made_up(TRUTHS["test"]))


@pytest.fixture
def right(lists: RankerLists) -> Scores:
    """Scores that put the true item of every user first."""
    scores = Scores(facts={"seconds_a_request": 0.5})
    for split, truths in TRUTHS.items():
        for user, truth in zip(lists.part(split).users, truths, strict=True):
            scores.splits.append(split)
            scores.users.append(user)
            scores.logprobs.append(np.eye(3, dtype=np.float32)[truth] * 9)
    return scores
