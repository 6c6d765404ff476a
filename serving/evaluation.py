"""Computes the paper's tables 1 and 3 from the exported files, and compares a server's answers with them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from models.intervals import bootstrap
from models.metrics import gains, summary
from models.ranker.fusion import boosted, fuse, order
from models.ranker.inference.ranker import Ranker
from models.retriever.candidates import Candidates
from models.retriever.rules import Selection
from models.retriever.trained import TrainedRetriever
from preprocessing.artifacts import read_manifest, replacing
from preprocessing.data import Data, load_data
from preprocessing.errors import InputError
from preprocessing.progress import track
from serving.layout import exported_release, step_artifact
from serving.offline import ExportedSteps
from serving.policy import retrieved, rules_for_known

SAVE_EVERY = 50
"""Number of users between two saves of the ranker's scores, so that an interrupted evaluation can resume."""


class ServedList(NamedTuple):
    """Answer of a running server."""

    items: list[str]
    """Raw ids, best first."""
    scores: list[float]


Ask = Callable[[Sequence[Sequence[str]]], Iterable[ServedList]]
"""Function that returns a running server's ranked list for each history of raw ids."""


@dataclass(frozen=True)
class TestUsers:
    """The exported retriever's results for every user of a data set."""

    names: list[str]
    histories: list[NDArray[np.int32]]
    """Training and validation items, oldest first."""
    candidates: list[Candidates]
    truth: NDArray[np.int32]
    ranks: NDArray[np.int32]
    """Rank of the true item among all items, from 1; 0 if it was masked. If the release has a policy, the rank among
    the candidates, and 0 for an item that is none."""

    def subset(self) -> list[int]:
        """Return the users whose true item is among the candidates, whom a ranker can help (paper, table 3)."""
        pairs = zip(self.candidates, self.truth, strict=True)
        return [user for user, (row, item) in enumerate(pairs) if item in row.items]


def evaluate(artifacts: Path, repository: Path, ask: Ask | None = None, oracle_users: int = 50) -> dict[str, Any]:
    """Measure the exported retriever and ranker on every user's test item.

    The exported files run offline as they run in the server: one ONNX pass and one prompt at a time, the same precision
    and number of threads, ties broken by retriever rank. Ranker scores are stored in ``artifacts/evaluation`` and
    reused as long as the export is the same.

    Args:
        artifacts: the data set's artifacts.
        repository: the exported model repository.
        ask: when given, every user's history is also sent to a running server, and identical rankings are counted.
        oracle_users: with ``ask``, number of users whose lists are also compared with fp32 PyTorch (fixed seed).

    Returns:
        ``{"dataset", "release", "users", "subset_users", "fusion_weight", "retriever": {"overall": {..}, "subset":
        {..}}, "ranker_alone", "ranker", "gain": {"mean", "low", "high"}, "served": {"users",
        "identical", "equal_to_oracle", ..}}``.

    Raises:
        InputError: nothing was exported, or the export was made from other data.
    """
    release = exported_release(repository)
    data = load_data(artifacts)
    check_exported_from(repository, data)
    steps = ExportedSteps.load(repository)
    users = _retrieve(steps, data)
    subset = users.subset()
    scored = range(len(users.names)) if ask else subset
    logits = _logits(steps, users, scored, artifacts / "evaluation" / f"logits-{release}.parquet")
    weight, temperature = steps.ranker.weight, steps.ranker.temperature
    ranks = {
        "retriever": users.ranks,
        "ranker_alone": _ranks(users, subset, logits, 0.0, temperature),
        "ranker": _ranks(users, subset, logits, weight, temperature),
    }
    _write(artifacts / "evaluation" / "ranks.parquet", {"user": users.names, **ranks})
    result: dict[str, Any] = {
        "dataset": data.name,
        "release": release,
        "users": len(users.names),
        "subset_users": len(subset),
        "fusion_weight": weight,
    }
    for name, places in ranks.items():
        result[name] = {"overall": summary(places), "subset": summary(places[subset]) if subset else {}}
    if len(users.names) > 1:
        gained = bootstrap(gains(ranks["ranker"], 10) - gains(ranks["retriever"], 10))
        result["gain"] = dict(zip(("mean", "low", "high"), gained, strict=True))
    if ask:
        lists = _offline_lists(steps, users, logits)
        result["served"] = {
            **_compare(data, users, lists, ask),
            **_compare_with_oracle(artifacts, repository, steps, users, lists, oracle_users),
        }
    return result


def check_exported_from(repository: Path, data: Data) -> None:
    """Check that a repository was exported from this data.

    Raises:
        InputError: it was exported from other data.
    """
    if read_manifest(step_artifact(repository, "ranker"), "step", "llamarec export").inputs["data"] != data.fingerprint:
        raise InputError(
            f"{repository} was exported from other data than the {data.name} artifacts: run `llamarec export` again"
        )


def _retrieve(steps: ExportedSteps, data: Data) -> TestUsers:
    histories, nothing = data.test_histories(), np.empty(0, np.int32)
    rules = rules_for_known(steps.policy, steps.catalogue)
    candidates, ranks = [], []
    for history, item in track(zip(histories, data.test, strict=True), "retrieving", len(histories)):
        found = retrieved(steps.retriever, steps.catalogue, rules, history, nothing)
        candidates.append(found)
        ranks.append(steps.retriever.rank(history, int(item)) if rules is None else _place(found, int(item)))
    return TestUsers(data.users, histories, candidates, data.test, np.array(ranks, np.int32))


def _place(candidates: Candidates, item: int) -> int:
    """Return the place of an item among the candidates, from 1; 0 if it is none."""
    places = np.flatnonzero(candidates.items == item)
    return int(places[0]) + 1 if len(places) else 0


def _logits(
    steps: ExportedSteps, users: TestUsers, scored: Sequence[int], cache: Path
) -> dict[int, NDArray[np.float32]]:
    """Return the ranker's logits for the ``scored`` users, read from the cache if they are in it."""
    place = {name: user for user, name in enumerate(users.names)}
    logits: dict[int, NDArray[np.float32]] = {}
    if cache.is_file():
        table = pq.read_table(cache)
        for name, row in zip(table["user"].to_pylist(), table["logits"].to_pylist(), strict=True):
            logits[place[name]] = np.array(row, np.float32)
    missing = [user for user in scored if user not in logits]
    for done, user in enumerate(track(missing, "ranking", len(missing)), start=1):
        candidates = users.candidates[user]
        logits[user] = steps.logits(users.histories[user], candidates) if len(candidates.items) else candidates.scores
        if done % SAVE_EVERY == 0 or done == len(missing):
            _write(cache, {"user": [users.names[user] for user in logits], "logits": list(logits.values())})
    return logits


def _write(path: Path, columns: dict[str, Any]) -> None:
    with replacing(path) as partial:
        pq.write_table(pa.table(columns), partial)


def _ranked(
    candidates: Candidates, logits: NDArray[np.float32], weight: float, temperature: float
) -> NDArray[np.int32]:
    """Return the item numbers of the candidates, best first."""
    if not len(candidates.items):  # the history holds the whole catalogue
        return candidates.items
    logprobs = boosted(fuse(logits, candidates.scores, weight), candidates.boosts, temperature)
    return candidates.items[order(logprobs, candidates.ranks)]


def _ranks(
    users: TestUsers, subset: Sequence[int], logits: dict[int, NDArray[np.float32]], weight: float, temperature: float
) -> NDArray[np.int32]:
    """Return the rank of each user's true item among the candidates, from 1; 0 if it is not a candidate."""
    ranks = np.zeros(len(users.names), np.int32)
    for user in subset:
        ranked = _ranked(users.candidates[user], logits[user], weight, temperature)
        ranks[user] = np.flatnonzero(ranked == users.truth[user])[0] + 1
    return ranks


def _offline_lists(
    steps: ExportedSteps, users: TestUsers, logits: dict[int, NDArray[np.float32]]
) -> list[NDArray[np.int32]]:
    weight, temperature = steps.ranker.weight, steps.ranker.temperature
    return [_ranked(row, logits[user], weight, temperature) for user, row in enumerate(users.candidates)]


def _compare(data: Data, users: TestUsers, lists: list[NDArray[np.int32]], ask: Ask) -> dict[str, Any]:
    def raw(items: NDArray[np.int32]) -> list[str]:
        return [data.catalogue.raw(int(item)).decode() for item in items]

    answers = track(ask([raw(history) for history in users.histories]), "querying the server", len(lists))
    identical = sum(answer.items == raw(items) for answer, items in zip(answers, lists, strict=True))
    return {"users": len(lists), "identical": identical}


def _compare_with_oracle(
    artifacts: Path,
    repository: Path,
    steps: ExportedSteps,
    users: TestUsers,
    lists: list[NDArray[np.int32]],
    oracle_users: int,
) -> dict[str, Any]:
    """Return the share of lists that retriever and ranker in fp32 PyTorch order identically."""
    chosen = np.random.default_rng(0).permutation(len(lists))[:oracle_users]
    rules = rules_for_known(steps.policy, steps.catalogue)
    lists_of = TrainedRetriever.load(artifacts / "retriever").retrieve(
        [users.histories[user] for user in chosen],
        steps.retriever.count,
        None if rules is None else Selection(rules, steps.catalogue.groups),
    )
    runtime = replace(steps.ranker.runtime, runtime="torch", dtype="float32")
    ranker = Ranker.load(step_artifact(repository, "ranker"), runtime)
    oracle = replace(steps, ranker=ranker)
    equal = 0
    for user, candidates in zip(track(chosen, "scoring with fp32 PyTorch", len(chosen)), lists_of, strict=True):
        ranked = _ranked(
            candidates, oracle.logits(users.histories[user], candidates), ranker.weight, ranker.temperature
        )
        equal += bool(np.array_equal(ranked, lists[user]))
    return {"equal_to_oracle": equal / max(len(chosen), 1), "oracle_users": len(chosen)}
