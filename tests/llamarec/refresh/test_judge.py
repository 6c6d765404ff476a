"""The rule by which a candidate is accepted, against hand-computed metrics, and who judges."""

from types import SimpleNamespace

import numpy as np
import pytest

from llamarec.refresh.judge import (
    RANKING,
    RETRIEVAL,
    Comparison,
    Difference,
    choose_judges,
    compare,
    judged_ranks,
    unknown_items,
)
from models.retriever.candidates import Candidates
from preprocessing.catalogue import Catalogue
from preprocessing.errors import InputError


def ranks(*places):
    return np.array(places, np.int32)


def against(candidate, serving):
    """Return the comparison of two lists of ranks as the retrieval stage's."""
    (row,) = compare({RETRIEVAL: ranks(*candidate), RANKING: ranks()}, {RETRIEVAL: ranks(*serving), RANKING: ranks()})
    return row


def test_a_comparison_by_hand():
    """Ranks 1, 3, 0 and 11 gain 1, 1 / log2(4), 0 and 0: the mean is 0.375, and two of four are among the first ten."""
    row = against([1, 3, 0, 11], [0, 1, 0, 7])
    assert (row.users, row.stage) == (4, RETRIEVAL)
    assert row.ndcg.candidate == pytest.approx((1 + 0.5) / 4)
    assert row.ndcg.serving == pytest.approx((1 + 1 / 3) / 4), "rank 7 gains 1 / log2(8)"
    assert row.ndcg.mean == pytest.approx((1 - 0.5 - 1 / 3) / 4)
    assert (row.recall.candidate, row.recall.serving, row.recall.mean) == (0.5, 0.5, 0.0)
    assert row.ndcg.low < row.ndcg.mean < row.ndcg.high


@pytest.mark.parametrize(
    ("candidate", "serving", "worse"),
    [
        ([1] * 50, [2] * 50, False),
        ([2] * 50, [1] * 50, True),
        ([4] * 50, [4] * 50, False),
        ([0] * 50, [0] * 50, False),
        # Five of fifty users win what five others lose.
        ([1, 2] * 5 + [5] * 40, [2, 1] * 5 + [5] * 40, False),
        # One user in fifty lost everything: a sample without this user has the difference 0, which the interval has.
        ([0] + [5] * 49, [1] + [5] * 49, False),
        ([0] * 20 + [5] * 30, [1] * 20 + [5] * 30, True),
    ],
    ids=["better", "worse", "equal", "nothing found", "undecided", "one user", "many users"],
)
def test_a_candidate_is_worse_only_beyond_the_interval(candidate, serving, worse):
    """Where all users have the same difference, the interval is that number; otherwise see the comments."""
    row = against(candidate, serving)
    assert row.worse is worse
    assert row.row()["worse"] is worse
    assert row.worse == (row.ndcg.high < 0)


def test_what_cannot_be_computed_is_refused():
    """NaN compares as false with everything: a rule `high < 0` would accept it."""
    nothing = Difference(*[float("nan")] * 5)
    assert Comparison(RETRIEVAL, 100, nothing, nothing).worse


def test_each_stage_is_compared_if_it_has_judges():
    """A ranker without judges (--judge-users 0) takes no part."""
    both = {RETRIEVAL: ranks(1, 2, 3), RANKING: ranks(1, 2)}
    assert [(row.stage, row.users) for row in compare(both, both)] == [(RETRIEVAL, 3), (RANKING, 2)]
    assert against([1, 2], [1, 2]).stage == RETRIEVAL


def test_too_few_judges_are_refused_with_the_number_that_is_needed():
    """As many as needed are enough; the ranker's are among those of the retrieval stage, and the choice is repeated."""
    with pytest.raises(InputError, match=r"^log.csv has new last events of 99 users, .*: 100 are needed"):
        choose_judges(range(99), 100, 10, "log.csv")
    judges = choose_judges(range(100), 100, 10, "log.csv")
    assert sorted(judges.all) == list(range(100))
    assert judges.ranked == judges.all[:10]
    assert judges == choose_judges(range(100), 100, 10, "log.csv")


class Steps:
    """Exported steps that know the items a, b and c and return them in this order, and rank them the other way."""

    catalogue = Catalogue([b"a", b"b", b"c"], ["A", "B", "C"], [1, 1, 1])

    def __init__(self):
        self.asked = []
        self.features = SimpleNamespace(encode=lambda history, *_: self.asked.append(history))

    def rules(self, history, request):
        return None

    def candidates(self, _, rules):
        items = np.array([1, 2, 3], np.int32)
        return Candidates(items, np.zeros(3, np.float32), items)

    def recommend(self, history):
        self.asked.append([raw.encode() for raw in history])
        return [("c", 0.5, 3), ("b", 0.3, 2), ("a", 0.2, 1)]


def test_the_rank_of_the_newest_item_in_both_lists():
    """User 0's newest item is the first retrieved and the last ranked. Item d is unknown to these steps: a miss.

    The histories are what came before, by raw ids, for users with and without a pass of the ranker.
    """
    data = SimpleNamespace(
        catalogue=Catalogue([b"d", b"c", b"b", b"a"], ["D", "C", "B", "A"], [1] * 4),
        test=np.array([4, 1, 2, 1], np.int32),
        raw_history=lambda user: [f"h{user}"],
    )
    judges = choose_judges(range(4), 2, 4, "x")._replace(all=[0, 1, 2, 3], ranked=[0, 1])
    steps = Steps()
    found = judged_ranks(steps, data, judges)
    assert found[RETRIEVAL].tolist() == [1, 0, 3, 0]
    assert found[RANKING].tolist() == [3, 0]
    assert steps.asked == [[b"h0"], [b"h1"], [b"h2"]], "an unknown item needs no answer"
    assert unknown_items(steps, data, judges.all) == 2
