"""Compares a candidate with the serving release, on events that neither was trained on."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llamarec_client.contract import MAX_HISTORY
from models.intervals import bootstrap
from models.metrics import gains, ndcg, recall
from preprocessing.data import Data
from preprocessing.errors import InputError
from preprocessing.progress import track
from serving.offline import ExportedSteps

CUTOFF = 10
"""Number of items at the top of a list that count, as in NDCG@10 and Recall@10."""
MOST_JUDGED = 10_000
"""Maximum number of users by whom the retrieval stage is judged, chosen at random."""
RETRIEVAL, RANKING = "retrieval", "ranking"
"""What is judged: the list of the retrieval stage, and the list that the ranker makes of it."""


class Judges(NamedTuple):
    """Users, by their index in the longer data."""

    all: list[int]
    """Whose newest event judges the retrieval stage."""
    ranked: list[int]
    """Those of them whose newest event judges the ranker too."""


def choose_judges(judged: Sequence[int], least: int, ranked: int, source: str) -> Judges:
    """Return the users by whom candidate and release are compared.

    Args:
        judged: users whose newest event no model was trained on.
        least: minimum number of them.
        ranked: maximum number of users by whom the ranker is judged, since each takes two of its passes.
        source: where the new events came from, for the message.

    Raises:
        InputError: there are too few.
    """
    if len(judged) < least:
        raise InputError(
            f"{source} has new last events of {len(judged):,} users, too few to tell whether a new release is worse:"
            f" {least:,} are needed, so wait for more events, or lower --least-users"
        )
    order = np.random.default_rng(0).permutation(len(judged))[:MOST_JUDGED]
    chosen = [judged[place] for place in order]
    return Judges(chosen, chosen[:ranked])


Ranks = Mapping[str, NDArray[np.int32]]
"""For :data:`RETRIEVAL` and :data:`RANKING`, the rank of each judge's newest item, from 1; 0 if it is not returned."""


def judged_ranks(steps: ExportedSteps, data: Data, judges: Judges) -> Ranks:
    """Return the ranks of the judges' newest items in the lists that exported steps make of what came before.

    Both sides get the same histories of raw ids, as the server would. Items of a history that the steps do not know
    are skipped, and an item that they do not know is not returned.

    Args:
        steps: those of the candidate, or of the serving release.
        data: the longer data.
        judges: see :func:`choose_judges`.
    """
    retrieval, ranking = np.zeros(len(judges.all), np.int32), np.zeros(len(judges.ranked), np.int32)
    for place, user in enumerate(track(judges.all, "judging", len(judges.all))):
        history, newest = data.raw_history(user)[-MAX_HISTORY:], data.catalogue.raw(int(data.test[user])).decode()
        if place < len(ranking):
            answer = steps.recommend(history)
            ranking[place] = next((rank for rank, row in enumerate(answer, start=1) if row[0] == newest), 0)
            retrieval[place] = next((row[2] for row in answer if row[0] == newest), 0)
        else:
            retrieval[place] = _retrieved(steps, history, newest)
    return {RETRIEVAL: retrieval, RANKING: ranking}


def _retrieved(steps: ExportedSteps, history: Sequence[str], newest: str) -> int:
    item = steps.catalogue.number(newest.encode())
    if item is None:
        return 0
    raw_history = [raw.encode() for raw in history]
    request = steps.features.encode(raw_history, [], None, None)
    found = np.flatnonzero(steps.candidates(request, steps.rules(raw_history, request)).items == item)
    return int(found[0]) + 1 if len(found) else 0


def unknown_items(steps: ExportedSteps, data: Data, users: Collection[int]) -> int:
    """Return the number of users whose newest item the steps do not know."""
    newest = (data.catalogue.raw(int(data.test[user])) for user in users)
    return sum(steps.catalogue.number(raw) is None for raw in newest)


@dataclass(frozen=True)
class Difference:
    """A metric of both sides, and what the candidate adds, with the 95 % interval of the bootstrap over the users."""

    candidate: float
    serving: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Candidate and serving release on the same users."""

    stage: str
    """:data:`RETRIEVAL` or :data:`RANKING`."""
    users: int
    ndcg: Difference
    """NDCG@10, by which the candidate is accepted or refused."""
    recall: Difference
    """Recall@10."""

    @property
    def worse(self) -> bool:
        """Whether the candidate is worse beyond the interval: its upper end is below 0, or nothing can be computed."""
        return not self.ndcg.high >= 0

    def row(self) -> dict[str, Any]:
        """Return the comparison for a report."""
        return {**asdict(self), "worse": self.worse}


def compare(candidate: Ranks, serving: Ranks) -> list[Comparison]:
    """Return the comparison of each stage that has judges.

    Args:
        candidate: the candidate's ranks, see :func:`judged_ranks`.
        serving: those of the serving release.
    """
    return [
        Comparison(
            stage,
            len(ranks),
            _difference(gains(ranks, CUTOFF), gains(serving[stage], CUTOFF), ndcg(ranks, CUTOFF)),
            _difference(_hits(ranks), _hits(serving[stage]), recall(ranks, CUTOFF)),
        )
        for stage, ranks in candidate.items()
        if len(ranks)
    ]


def _hits(ranks: NDArray[np.int32]) -> NDArray[np.float64]:
    return ((ranks >= 1) & (ranks <= CUTOFF)).astype(np.float64)


def _difference(candidate: NDArray[np.float64], serving: NDArray[np.float64], mean: float) -> Difference:
    differences = candidate - serving
    # One user has no interval: the difference is all that there is.
    added = bootstrap(differences) if len(differences) > 1 else (float(differences[0]),) * 3
    return Difference(mean, float(serving.mean()), *added)
