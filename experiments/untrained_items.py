"""Measures the retrieval of items that were not trained, by their titles.

    python -m experiments.untrained_items    # make retrain-untrained: half an hour

A tenth of the items is taken out of training altogether: out of every training sequence, and out of every history. The
test users whose next item is one of them show whether it is found by its title among all items ("new items"); the
others show what the known items lose by the competition ("known items"). How an untrained item's vector is completed is
chosen on the validation users whose next item was taken out.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.datasets import (
    SOURCES,
    add_data_option,
    add_work_option,
    data_folder,
    is_derived,
    preprocessing_of,
    write_derived,
)
from experiments.kept import LADDERS, write_untrained
from experiments.retrieval_ladder import BEAUTY, ML
from models.metrics import recall
from models.retriever.architectures.build import build_model
from models.retriever.batches import Items
from models.retriever.candidates import mask, place_of
from models.retriever.options import RetrieverTraining
from models.retriever.stage import RetrievalStage, rank_in
from models.retriever.titles import all_titles
from models.retriever.trained import TrainedModel, TrainedRetriever
from models.retriever.training import fit_signals, train_retriever
from models.signals.fitting import count_statistics
from models.signals.signals import RECENT
from preprocessing.catalogue import Catalogue
from preprocessing.data import TYPES, Data, load_data
from preprocessing.errors import InputError
from preprocessing.preprocess import preprocess

SHARE, SEED = 0.1, 0
"""Share of the items that are taken out, and the seed by which they are drawn."""
MADE_WITH = {"taken_out": SHARE, "seed": SEED}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "ml-latest-small": {**ML, "titles": "words"},
    "amazon-2014-beauty": {**BEAUTY, "titles": "words"},
}


@dataclass(frozen=True)
class Way:
    """One way to retrieve with the same trained weights."""

    untrained: bool
    """Whether untrained items take part."""
    signals: bool


WAYS: Mapping[str, Way] = {
    "LRURec with titles": Way(False, False),
    "LRURec with titles, untrained items too": Way(True, False),
    "LRURec with titles and signals": Way(False, True),
    "LRURec with titles and signals, untrained items too": Way(True, True),
}


def take_out(whole: Path, folder: Path) -> Path:
    """Write the data set without a tenth of its items in the sequences into ``folder``, and return that folder.

    The items that were taken out stay in the catalogue, after the others, with a title and no count. The last two of
    the remaining items before a user's test item become the end of training and the validation item; the test item
    stays what it was. Users with fewer than three remaining items are left out.
    """
    if is_derived(whole, folder, MADE_WITH):
        return folder
    data = load_data(whole)
    items = data.catalogue.trained
    out = np.random.default_rng(SEED).permutation(items)[: round(SHARE * items)] + 1
    kept = np.setdiff1d(np.arange(1, items + 1), out)
    order = np.concatenate((kept, np.sort(out)))
    number = np.zeros(items + 1, np.int32)
    number[order] = np.arange(1, items + 1)
    rows: dict[str, list[Any]] = {name: [] for name in TYPES}
    for user, history, item in zip(data.users, data.test_histories(), data.test, strict=True):
        left = number[history]
        left = left[left <= len(kept)]
        if len(left) >= 2:
            for name, value in zip(TYPES, (user, left[:-1], left[-1], number[item]), strict=True):
                rows[name].append(value)
    counts = np.bincount(np.concatenate(rows["training"]), minlength=items + 1)[1 : len(kept) + 1]
    catalogue = Catalogue(
        [data.catalogue.raw(int(item)) for item in order],
        [data.catalogue.title(int(item)) for item in order],
        counts.tolist(),
    )
    write_derived(whole, folder, MADE_WITH, rows, catalogue)
    return folder


def by_titles(data: Data) -> NDArray[np.int32]:
    """Return each test user's rank of the true item by title likeness to the recent history alone."""
    statistics = count_statistics(data.training, all_titles(data), data.catalogue.trained)
    items = np.arange(len(data.catalogue) + 1, dtype=np.int32)
    ranks = []
    for history, item in zip(data.test_histories(), data.test, strict=True):
        scores = statistics.likeness(items, history[-RECENT:]).mean(axis=1)
        ranks.append(_rank(scores, history, int(item)))
    return np.array(ranks, np.int32)


def by_popularity(data: Data) -> NDArray[np.int32]:
    """Return each test user's rank of the true item by popularity in the training sequences."""
    counts = np.zeros(len(data.catalogue) + 1, np.float32)
    counts[1 : data.catalogue.trained + 1] = data.catalogue.counts
    histories = zip(data.test_histories(), data.test, strict=True)
    return np.array([_rank(counts.copy(), history, int(item)) for history, item in histories], np.int32)


def by_chance(data: Data) -> NDArray[np.int32]:
    """Return each test user's rank of the true item in a random order of all items."""
    draw = np.random.default_rng(SEED)
    histories = zip(data.test_histories(), data.test, strict=True)
    return np.array(
        [_rank(draw.random(len(data.catalogue) + 1, np.float32), history, int(item)) for history, item in histories],
        np.int32,
    )


def _rank(scores: NDArray[np.float32], history: Items, item: int) -> int:
    mask(scores, history)
    return place_of(scores, item)


def by_retriever(retriever: TrainedRetriever, data: Data) -> NDArray[np.int32]:
    """Return each test user's rank of the true item by a trained retriever; 0 for an item that it does not know."""
    histories, ranks = data.test_histories(), []
    for rows, history, item in zip(retriever.rows(histories), histories, data.test, strict=True):
        ordered = retriever.stage.ordered(rows, history, history, 20)
        ranks.append(rank_in(ordered, rows[0], int(item)))
    return np.array(ranks, np.int32)


def train(dataset: str, work: Path, folder: Path) -> TrainedModel:
    """Return the retriever that was trained with the titles' words, trained where it is missing."""
    artifacts = work / f"{folder.name}-titles"
    artifacts.mkdir(exist_ok=True)
    (artifacts / "data").unlink(missing_ok=True)
    (artifacts / "data").symlink_to((folder / "data").resolve())
    train_retriever(RetrieverTraining(**MODELS[dataset]), artifacts)
    return TrainedRetriever.load(artifacts / "retriever").models[0]


def by_way(trained: TrainedModel, way: Way, data: Data) -> NDArray[np.int32]:
    """Return each test user's rank of the true item by a way; 0 for an item that it does not know."""
    model = trained if way.untrained else first_items(trained, data.catalogue.trained)
    signals = fit_signals(trained.options, data, [model]) if way.signals else None
    return by_retriever(TrainedRetriever([model], RetrievalStage(signals)), data)


def first_items(trained: TrainedModel, items: int) -> TrainedModel:
    """Return the same model with the first items alone."""
    state = {**trained.model.state_dict()}
    state |= {name: state[name][: items + 1] for name in ("embedding.weight", "bias")}
    model = build_model(replace(trained.options, titles="none"), items)
    model.load_state_dict(state)
    return TrainedModel(model.eval(), trained.options, items)


def measure(dataset: str, work: Path, folder: Path, path: Path) -> None:
    """Measure every way on one data set, and keep the ranks."""
    data = load_data(folder)
    ranks = {"chance": by_chance(data), "popularity": by_popularity(data), "title likeness": by_titles(data)}
    trained = train(dataset, work, folder)
    ranks |= {name: by_way(trained, way, data) for name, way in WAYS.items()}
    new = data.test > data.catalogue.trained
    for name, found in ranks.items():
        print(f"{name}: new {_recalls(found[new])}, known {_recalls(found[~new])}", flush=True)
    write_untrained(path, data.users, new, ranks)


def _recalls(ranks: Sequence[int] | NDArray[np.int32]) -> str:
    return f"{recall(ranks, 10):.4f} / {recall(ranks, 20):.4f}"


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_option(parser)
    add_work_option(parser)
    parser.add_argument("--dataset", action="append", choices=tuple(SOURCES), help="Repeatable. Default: both.")
    given = parser.parse_args()
    try:
        for dataset in given.dataset or tuple(SOURCES):
            folder = given.work / dataset
            preprocess(preprocessing_of(dataset, data_folder(given.data)), folder)
            folder = take_out(folder, given.work / f"{dataset}-untrained")
            if not (path := LADDERS / f"{folder.name}.parquet").exists():
                measure(dataset, given.work, folder, path)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
