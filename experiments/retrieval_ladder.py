"""Trains and measures the retrieval stage step by step: plain, with titles, with signals, with a second retriever.

    python -m experiments.retrieval_ladder    # make retrain-ladder: hours; what is kept is skipped

For each data set and seed it keeps every user's ranks by each rung in docs/results/data/ladder. The signals' weights
are fitted on validation users; nothing is chosen on the test split.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.datasets import SOURCES, add_data_option, add_work_option, data_folder, preprocessing_of
from experiments.kept import SPLITS, STATES, keep_state, ladder_path, read_ladder, write_ladder
from experiments.random_ties import write_random_ties
from models.metrics import ndcg, recall
from models.retriever.batches import Items
from models.retriever.candidates import mask, place_of
from models.retriever.options import RetrieverTraining
from models.retriever.stage import RetrievalStage, pool_of
from models.retriever.titles import all_titles
from models.retriever.trained import TrainedModel, TrainedRetriever
from models.retriever.training import FITTED_USERS, train_retriever
from models.signals.fitting import count_statistics, fit_weights
from models.signals.signals import RECENT, RETRIEVERS, SIGNALS, ItemStatistics
from preprocessing.data import Data, load_data
from preprocessing.errors import InputError
from preprocessing.preprocess import preprocess
from preprocessing.progress import track

SEEDS = (42, 43, 44)
POOL = 200
SHORT = {"validate_every": 200, "patience": 8}
ML = {**SHORT, "max_length": 200, "batch_size": 16, "dropout": 0.5, "weight_decay": 0.0}
BEAUTY = {**SHORT, "dropout": 0.5}
SASREC = {**SHORT, "model": "sasrec", "dropout": 0.6, "batch_size": 512}
MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "ml-latest-small": {"plain": ML, "titles": {**ML, "titles": "words"}},
    "amazon-2014-beauty": {
        "titles": {**BEAUTY, "titles": "words"},
        "second": {**SASREC, "titles": "words"},
    },
}
"""Options of each model by data set, without the seed, as validation chose them in `experiments.train_retrievers`."""
LIKENESS = ("likeness_mean", "likeness_max", "likeness_last")


@dataclass(frozen=True)
class Rung:
    """One way to retrieve."""

    models: tuple[str, ...]
    """Names in :data:`MODELS`; none for the transition graph alone."""
    signals: tuple[str, ...] = ()


def without(*left_out: str) -> tuple[str, ...]:
    """Return all signals but some."""
    return tuple(name for name in SIGNALS if name not in left_out)


RUNGS: Mapping[str, Mapping[str, Rung]] = {
    "ml-latest-small": {
        "transitions alone": Rung((), ("transitions",)),
        "plain": Rung(("plain",)),
        "plain + signals": Rung(("plain",), SIGNALS),
        "titles": Rung(("titles",)),
        "plain, titles": Rung(("plain", "titles")),
        "plain, titles + signals": Rung(("plain", "titles"), SIGNALS),
        "plain + signals without popularity": Rung(("plain",), without("popularity")),
        "plain + signals without likeness": Rung(("plain",), without(*LIKENESS)),
        "plain + signals without transitions": Rung(("plain",), without("transitions")),
        "plain + signals without co-occurrence": Rung(("plain",), without("co_occurrence")),
    },
    "amazon-2014-beauty": {
        "transitions alone": Rung((), ("transitions",)),
        "titles": Rung(("titles",)),
        "titles + signals": Rung(("titles",), SIGNALS),
        "second": Rung(("second",)),
        "titles, second": Rung(("titles", "second")),
        "titles, second + signals": Rung(("titles", "second"), SIGNALS),
        "titles + signals without popularity": Rung(("titles",), without("popularity")),
        "titles + signals without likeness": Rung(("titles",), without(*LIKENESS)),
        "titles + signals without transitions": Rung(("titles",), without("transitions")),
        "titles + signals without co-occurrence": Rung(("titles",), without("co_occurrence")),
    },
}
"""The rungs of each data set by name. Plain LRURec's ranks on Beauty are those of `experiments.train_retrievers`."""


@dataclass(frozen=True)
class Pools:
    """Every user's pool of candidates in one split: what each retriever and each signal says of them."""

    sources: list[NDArray[np.float32]]
    """For each user [k, retrievers + signals]."""
    truths: list[int]
    """Position (from 0) of each user's true item in the pool; -1 if it is not in it."""
    outside: list[int]
    """Rank of each user's true item if it is not in the pool, else 0."""

    def ranks(self, weights: NDArray[np.float64]) -> NDArray[np.int16]:
        """Return each user's rank of the true item by the weighted sums; see models.retriever.stage."""
        ranks = np.array(self.outside, np.int16)
        for user, (sources, truth) in enumerate(zip(self.sources, self.truths, strict=True)):
            if truth >= 0:
                scores = (sources.astype(np.float64) * weights).sum(axis=1)
                better = scores > scores[truth]
                better[:truth] |= scores[:truth] == scores[truth]
                ranks[user] = 1 + np.count_nonzero(better)
        return ranks


def find_pools(
    trained: TrainedRetriever, statistics: ItemStatistics, histories: Sequence[Items], truth: NDArray[np.int32]
) -> Pools:
    """Return the pools of all users.

    Args:
        trained: one or two retrievers.
        statistics: what the signals read.
        histories: each user's history.
        truth: each user's true item [users].
    """
    pools = Pools([], [], [])
    rows_of = zip(trained.rows(histories), histories, truth.tolist(), strict=True)
    for rows, history, item in track(rows_of, "finding pools", len(histories)):
        items, logits = pool_of(rows, history, POOL)
        signals = statistics.signals(history, items)
        pools.sources.append(np.concatenate((logits, signals), axis=1, dtype=np.float32))
        found = np.flatnonzero(items == item)
        pools.truths.append(int(found[0]) if len(found) else -1)
        pools.outside.append(0)
        if not len(found) and np.isfinite(rows[0][item]):
            mask(rows[0], items)
            pools.outside[-1] = len(items) + place_of(rows[0], item)
    return pools


def measure(name: str, rung: Rung, pools: Mapping[str, Pools], users: NDArray[np.int64]) -> dict[str, Any]:
    """Fit the weights of a rung on the validation users, and return them with the ranks of both splits.

    Args:
        name: name of the rung.
        rung: the rung.
        pools: pools of both splits, of the rung's models.
        users: validation users to fit on.
    """
    retrievers = len(rung.models)
    columns = [*range(retrievers), *(retrievers + SIGNALS.index(signal) for signal in rung.signals)]
    weights = np.zeros(retrievers + len(SIGNALS))
    if len(columns) == 1:
        weights[columns] = 1
    else:
        fitted_on = [user for user in users.tolist() if pools["validation"].truths[user] >= 0]
        sources = [pools["validation"].sources[user].astype(np.float64) for user in fitted_on]
        allowed: NDArray[np.float64] = np.isin(np.arange(len(weights)), columns).astype(np.float64)
        truths = [pools["validation"].truths[user] for user in fitted_on]
        fitted = fit_weights([some * allowed for some in sources], truths, retrievers)
        weights = np.array(list(fitted.values())) * allowed
    ranks = {split: pools[split].ranks(weights) for split in SPLITS}
    test, names = ranks["test"], (*RETRIEVERS[:retrievers], *SIGNALS)
    print(f"{name}: {recall(test, 10):.4f} / {ndcg(test, 10):.4f}", flush=True)
    return {**ranks, "weights": dict(zip(names, weights.tolist(), strict=True))}


def transitions_alone(statistics: ItemStatistics, data: Data) -> dict[str, Any]:
    """Return the ranks of both splits by the transition graph alone, over all items."""
    items = np.arange(1, data.catalogue.trained + 1, dtype=np.int32)
    ranks = {}
    for split, histories, truth in splits(data):
        places = []
        for history, item in zip(track(histories, "transitions alone", len(histories)), truth, strict=True):
            scores = np.append(0, statistics.transitions(items, history[-RECENT:][::-1])).astype(np.float32)
            mask(scores, history)
            places.append(place_of(scores, int(item)))
        ranks[split] = np.array(places, np.int16)
    return {**ranks, "weights": {"transitions": 1.0}}


def splits(data: Data) -> Iterator[tuple[str, Sequence[Items], NDArray[np.int32]]]:
    """Yield name, histories and true items of both splits."""
    yield "validation", data.training, data.validation
    yield "test", data.test_histories(), data.test


def climb(dataset: str, seed: int, work: Path, folder: Path, postponed: Sequence[str] = ()) -> None:
    """Measure the rungs of a data set with one seed whose ranks are not kept yet, and keep them.

    Args:
        dataset: name of the data set.
        seed: the trainings' seed.
        work: folder for weights and checkpoints; models that are missing there are trained.
        folder: folder that holds the preprocessed data; its name is the kept file's.
        postponed: models whose rungs are left for another time.
    """
    path = ladder_path(folder.name, seed)
    kept: dict[str, dict[str, Any]] = read_ladder(path) if path.exists() else {}
    rungs = {name: rung for name, rung in RUNGS[dataset].items() if name not in kept}
    rungs = {name: rung for name, rung in rungs.items() if not set(rung.models) & set(postponed)}
    if not rungs:
        return
    data = load_data(folder)
    statistics = count_statistics(data.training, all_titles(data), data.catalogue.trained)
    users = np.random.default_rng(seed).permutation(len(data.users))[:FITTED_USERS]
    for models in dict.fromkeys(rung.models for rung in rungs.values()):
        some = {name: rung for name, rung in rungs.items() if rung.models == models}
        if not models:
            kept |= {name: transitions_alone(statistics, data) for name in some}
            continue
        trained = [train(dataset, model, seed, work, folder) for model in models]
        stage = TrainedRetriever(trained, RetrievalStage())
        pools = {split: find_pools(stage, statistics, past, truth) for split, past, truth in splits(data)}
        kept |= {name: measure(name, rung, pools, users) for name, rung in some.items()}
    write_ladder(path, data.users, kept)


def train(dataset: str, model: str, seed: int, work: Path, folder: Path) -> TrainedModel:
    """Return one of the models of :data:`MODELS`, trained where it is neither in ``work`` nor in experiments/kept.

    Kept, in half precision, are those of Beauty, whose trainings take longest, and those of ml-latest-small with the
    first seed.
    """
    artifacts = work / f"{folder.name}-{model}-seed{seed}"
    if not artifacts.exists() and (STATES / artifacts.name).exists():
        return TrainedModel.load(STATES / artifacts.name)
    artifacts.mkdir(exist_ok=True)
    (artifacts / "data").unlink(missing_ok=True)
    (artifacts / "data").symlink_to((folder / "data").resolve())
    # Untrained items would take places among the candidates that no test user needs.
    options = RetrieverTraining(**MODELS[dataset][model], seed=seed, untrained=False)
    train_retriever(options, artifacts)
    trained = TrainedRetriever.load(artifacts / "retriever").models[0]
    if folder.name == dataset and (seed == SEEDS[0] or dataset == "amazon-2014-beauty"):
        keep_state(artifacts.name, trained)
    return trained


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_option(parser)
    add_work_option(parser)
    parser.add_argument("--dataset", action="append", choices=tuple(SOURCES), help="Repeatable. Default: both.")
    parser.add_argument("--seed", action="append", type=int, help=f"Repeatable. Default: {SEEDS}.")
    parser.add_argument("--postpone", action="append", default=[], help="Model to leave for another time. Repeatable.")
    parser.add_argument(
        "--random-ties", action="store_true", help="Put interactions of equal time in random order: the control."
    )
    given = parser.parse_args()
    try:
        for dataset in given.dataset or tuple(SOURCES):
            folder = given.work / dataset
            preprocess(preprocessing_of(dataset, data_folder(given.data)), folder)
            if given.random_ties:
                folder = write_random_ties(folder, given.work / f"{dataset}-random-ties")
            for seed in given.seed or SEEDS:
                climb(dataset, seed, given.work, folder, given.postpone)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
