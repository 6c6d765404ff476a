"""Trains the retrievers of docs/results/retrievers.md and keeps every user's ranks in docs/results/data.

    python -m experiments.train_retrievers    # make retrain-retrievers: hours; runs whose ranks are kept are skipped

Settings are chosen by validation Recall@10 alone.
"""

import argparse
import fcntl
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from experiments.datasets import SOURCES, add_data_option, add_work_option, data_folder, preprocessing_of
from experiments.kept import (
    RETRIEVERS,
    SPLITS,
    RetrieverRun,
    changed_options,
    choose,
    ranks_path,
    read_retriever_runs,
    write_ranks,
)
from models.metrics import recall
from models.ranker.title_states import encode_titles
from models.retriever.fitting.loop import sent_histories
from models.retriever.options import RetrieverTraining
from models.retriever.ranking import rank_users
from models.retriever.trained import TrainedRetriever
from models.retriever.training import train_retriever
from models.titles.vectors import KIND as TITLES
from preprocessing.data import load_data
from preprocessing.errors import InputError
from preprocessing.preprocess import preprocess

SHORT = {"validate_every": 200, "patience": 8}
ML = {"max_length": 200, "batch_size": 16, **SHORT}
BERT = {**SHORT, "model": "bert4rec", "heads": 2, "dropout": 0.2, "batch_size": 256, "patience": 16}
WORDS = {"titles": "words", "untrained": False}
"""Untrained items would take places among the candidates, and no test user's next item is one of them."""
RUNS: dict[str, list[dict[str, Any]]] = {
    "ml-latest-small": [
        *({**ML, "dropout": dropout} for dropout in (0.2, 0.3, 0.4, 0.5)),
        *({**ML, "model": "sasrec", "dropout": dropout} for dropout in (0.4, 0.2)),
        {**ML, "model": "narm", "blocks": 1, "max_length": 50, "dropout": 0.25},
        {**ML, "model": "bert4rec", "heads": 2, "dropout": 0.2},
        {**ML, "model": "sasrec", "loss": "binary", "dropout": 0.2},
        {**ML, "dropout": 0.1},
        {**ML, "model": "bert4rec", "heads": 2, "dropout": 0.2, "patience": 40},
        {**ML, "model": "sasrec", "dropout": 0.6},
        *({**ML, "model": "narm", "blocks": 1, "max_length": 50, "dropout": dropout} for dropout in (0.1, 0.5)),
        *({**ML, "model": "sasrec", "loss": "binary", "dropout": dropout} for dropout in (0.5, 0.4)),
        *(
            {**ML, "model": "bert4rec", "heads": 2, "dropout": dropout, "patience": 40, "epochs": epochs}
            for dropout, epochs in ((0.1, 250), (0.4, 200))
        ),
        {**ML, "dropout": 0.5, "weight_decay": 0.0, **WORDS},
    ],
    "amazon-2014-beauty": [
        {**SHORT, "dropout": 0.5},
        {**SHORT, "model": "sasrec", "dropout": 0.6, "batch_size": 512, "learning_rate": 1e-3},
        {**SHORT, "model": "narm", "blocks": 1, "dropout": 0.25},
        {**SHORT, "model": "sasrec", "loss": "binary", "dropout": 0.5},
        *({**BERT, "masked_share": share} for share in (0.2, 0.6)),
        *({**SHORT, "model": "narm", "blocks": 1, "dropout": dropout} for dropout in (0.5, 0.6)),
        {**BERT, "masked_share": 0.6, "dropout": 0.4},
        {**SHORT, "model": "sasrec", "loss": "binary", "dropout": 0.2},
        *({**SHORT, "dropout": 0.5, **WORDS, "titles": titles} for titles in ("words", "model")),
        {**SHORT, "model": "sasrec", "dropout": 0.6, "batch_size": 512, "learning_rate": 1e-3, **WORDS},
        {**SHORT, "dropout": 0.5, "negatives": 1024},
        {**BERT, "masked_share": 0.6, **WORDS},
        {**SHORT, "model": "narm", "blocks": 1, "dropout": 0.5, **WORDS},
    ],
}
"""What differs from the defaults of :class:`RetrieverTraining`, by data set, in the order of training.

BERT4Rec has more patience: with 8 it stopped on ml-latest-small while its loss was still falling. Two of its runs there
are limited in epochs to save time.
"""
SEEDS = (43, 44)
"""Further seeds of LRURec's chosen setting, and of the best model's."""
PRUNED_FROM = 1000
"""Step from which a run may be pruned."""
PRUNED_BELOW = 0.85
"""A run is pruned below this share of what another run of the same model had reached by that step."""


class Pruned(Exception):  # noqa: N818 - no error: the run is given up
    """Validation is too far below that of another run of the same model."""


def train_all(work: Path, raw: Path, datasets: Sequence[str]) -> None:
    """Train every run whose ranks are not kept yet and that no other process is training.

    An interrupted run is resumed from its last validation; checkpoints and weights stay in ``work``.

    Args:
        work: folder for preprocessed data, weights and checkpoints.
        raw: folder with the raw data sets.
        datasets: names of the data sets.
    """
    for dataset in datasets:
        preprocess(preprocessing_of(dataset, raw), work / dataset)
        for options in _planned(dataset):
            path = ranks_path(dataset, options)
            folder = work / path.stem
            folder.mkdir(exist_ok=True)
            with (folder / "lock").open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                if not path.exists():
                    if options.titles == "model":
                        encode_titles(work / dataset)
                    for part in ("data", TITLES):
                        (folder / part).unlink(missing_ok=True)
                        (folder / part).symlink_to((work / dataset / part).resolve())
                    _train_one(dataset, options, folder, path)


def _planned(dataset: str) -> Iterator[RetrieverTraining]:
    """Yield the runs of a data set in order; the later ones depend on the validation results of the earlier ones."""
    for changed in RUNS[dataset]:
        yield RetrieverTraining(**changed)
    ended = [run for run in _kept(dataset) if run.model == "lrurec" and not run.pruned]
    with_decay = [run for run in ended if run.options["weight_decay"] > 0]
    without_decay = 2 if dataset == "ml-latest-small" else 0
    for run in sorted(with_decay, key=lambda run: -recall(run.validation, 10))[:without_decay]:
        yield replace(RetrieverTraining(**run.options), seed=42, weight_decay=0.0)
    chosen = choose(_kept(dataset))
    best = max(chosen, key=lambda model: recall(chosen[model][0].validation, 10))
    with_titles = [model for model in ("lrurec, titles", "sasrec, titles") if dataset != "ml-latest-small"]
    for model in dict.fromkeys(("lrurec", best, *with_titles)):
        for seed in SEEDS:
            yield replace(RetrieverTraining(**chosen[model][0].options), seed=seed)


def _kept(dataset: str) -> list[RetrieverRun]:
    return [run for run in read_retriever_runs(RETRIEVERS) if run.dataset == dataset]


def _train_one(dataset: str, options: RetrieverTraining, folder: Path, path: Path) -> None:
    curve: list[tuple[int, float | None, float]] = []
    try:
        metrics = train_retriever(options, folder, _pruning(dataset, options, curve))
    except Pruned:
        columns: Mapping[str, Any] = {}
        facts = {"steps": curve[-1][0], "best_step": 0, "seconds": 0, "curve": curve, "pruned": True}
        reached = "pruned"
    else:
        columns = _ranks(folder)
        facts = {name: metrics[name] for name in ("steps", "best_step", "seconds", "curve")}
        reached = f"test Recall@10 {metrics['test']['Recall@10']:.4f}"
    write_ranks(path, dataset, options, facts, columns)
    print(f"{path.name}: {changed_options(options)} {reached}, {facts['steps']} steps", flush=True)


def _pruning(
    dataset: str, options: RetrieverTraining, curve: list[tuple[int, float | None, float]]
) -> Callable[[int, float], None]:
    """Return what a training calls after every validation: it extends ``curve``, and raises if the run is pruned."""
    others = [
        run
        for run in _kept(dataset)
        if all(run.options[name] == getattr(options, name) for name in ("model", "loss", "titles"))
    ]

    def watch(step: int, reached: float) -> None:
        curve.append((step, None, reached))
        best = max((run.reached_by(step) for run in others), default=0.0)
        if step >= PRUNED_FROM and max(at for _, _, at in curve) < PRUNED_BELOW * best:
            raise Pruned

    return watch


def _ranks(folder: Path) -> dict[str, Any]:
    """Return the columns to keep of the trained retriever in ``folder``."""
    tables = {split: pq.read_table(folder / "retriever" / f"candidates-{split}.parquet") for split in SPLITS}
    return {
        "user": tables["test"]["user"],
        **{split: table["rank"] for split, table in tables.items()},
        "last_window": pa.array(_last_window_ranks(folder), pa.int32()),
    }


def _last_window_ranks(folder: Path) -> NDArray[np.int32]:
    (trained,) = TrainedRetriever.load(folder / "retriever").models
    data = load_data(folder)
    sent = sent_histories(data.test_histories(), replace(trained.options, mask="last-window"))
    return rank_users(trained.model, trained.options.max_length, sent, data.test)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_option(parser)
    add_work_option(parser)
    parser.add_argument("--dataset", action="append", choices=tuple(SOURCES), help="Repeatable. Default: both.")
    given = parser.parse_args()
    try:
        raw = data_folder(given.data)
        given.work.mkdir(parents=True, exist_ok=True)
        train_all(given.work, raw, given.dataset or tuple(SOURCES))
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
