"""Quality of the retrievers beside the paper's: trains the runs below and keeps every user's ranks.

    python -m benchmarks.retrievers train     # make retrain-retrievers: hours; a run whose ranks are there is left out
    python -m benchmarks.retrievers tables    # make results-retrievers: docs/results/retrievers.md from the ranks

Settings are chosen by validation Recall@10 alone; the tables report the test split of what was chosen.
"""

import argparse
import fcntl
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.retriever_tables import choose, load_runs, write_page
from models.metrics import recall
from models.retriever.fitting.loop import sent_histories
from models.retriever.options import RetrieverTraining
from models.retriever.ranking import rank_users
from models.retriever.training import load_retriever, train_retriever
from preprocessing.data import load_data
from preprocessing.preprocess import Preprocessing, preprocess

ROOT = Path(__file__).resolve().parents[1]
RANKS = ROOT / "docs" / "results" / "data"
PAGE = ROOT / "docs" / "results" / "retrievers.md"
DATA = {
    "ml-latest-small": Preprocessing(dataset="movielens", raw=ROOT / "../shared/data/ml-latest-small"),
    "amazon-2014-beauty": Preprocessing(dataset="amazon", raw=ROOT / "../shared/data/amazon-2014-beauty"),
}
SHORT = {"validate_every": 200, "patience": 8}
ML = {"max_length": 200, "batch_size": 16, **SHORT}
BERT = {**SHORT, "model": "bert4rec", "heads": 2, "dropout": 0.2, "batch_size": 256, "patience": 16}
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
    ],
}
"""What differs from the defaults of :class:`RetrieverTraining`, by data set, in the order of training.

BERT4Rec has more patience: with 8 it stopped on ml-latest-small where its loss was still falling. Two of its runs there
are bounded in epochs, for time.
"""
SEEDS = (43, 44)
"""Further seeds of what validation chose of LRURec, and of the best model."""
PRUNED_FROM = 1000
"""Step from which a run may be given up."""
PRUNED_BELOW = 0.85
"""Share of what another run of the same model had reached by that step, under which it is."""


class Pruned(Exception):  # noqa: N818 - no error: the run is given up
    """Validation is too far below that of a run of the same model."""


def ranks_path(dataset: str, options: RetrieverTraining) -> Path:
    """Where the ranks of a run are kept."""
    changed = json.dumps(changed_options(options), sort_keys=True)
    settings = hashlib.sha256(changed.encode()).hexdigest()[:12]
    return RANKS / f"{dataset}-{options.model}-seed{options.seed}-{settings}.parquet"


def train(work: Path, datasets: Sequence[str]) -> None:
    """Trains every run whose ranks are not there yet and that no other process is at.

    An interrupted run goes on from its last validation; checkpoints and weights stay in ``work``.
    """
    RANKS.mkdir(parents=True, exist_ok=True)
    for dataset in datasets:
        preprocess(DATA[dataset], work / dataset)
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
                    (folder / "data").unlink(missing_ok=True)
                    (folder / "data").symlink_to((work / dataset / "data").resolve())
                    _train_one(dataset, options, folder, path)


def _planned(dataset: str) -> Iterator[RetrieverTraining]:
    """The runs of a data set in order; the later ones follow from what the earlier ones reached on validation."""
    for changed in RUNS[dataset]:
        yield RetrieverTraining(**changed)
    kept = [run for run in load_runs(RANKS) if run.dataset == dataset]
    ended = [run for run in kept if run.model == "lrurec" and not run.pruned and run.options["weight_decay"] > 0]
    without_decay = 2 if dataset == "ml-latest-small" else 0
    for run in sorted(ended, key=lambda run: -recall(run.validation, 10))[:without_decay]:
        yield replace(RetrieverTraining(**run.options), seed=42, weight_decay=0.0)
    chosen = choose([run for run in load_runs(RANKS) if run.dataset == dataset])
    best = max(chosen, key=lambda model: recall(chosen[model][0].validation, 10))
    for model in dict.fromkeys(("lrurec", best)):
        for seed in SEEDS:
            yield replace(RetrieverTraining(**chosen[model][0].options), seed=seed)


def _train_one(dataset: str, options: RetrieverTraining, folder: Path, path: Path) -> None:
    others = [run for run in load_runs(RANKS) if run.dataset == dataset and run.options["loss"] == options.loss]
    others = [run for run in others if run.options["model"] == options.model]
    curve: list[tuple[int, float | None, float]] = []

    def watch(step: int, reached: float) -> None:
        curve.append((step, None, reached))
        best = max((run.reached_by(step) for run in others), default=0.0)
        if step >= PRUNED_FROM and max(at for _, _, at in curve) < PRUNED_BELOW * best:
            raise Pruned

    columns: dict[str, Any] = {}
    try:
        metrics = train_retriever(options, folder, watch)
    except Pruned:
        facts = {"steps": curve[-1][0], "best_step": 0, "seconds": 0, "curve": curve, "pruned": True}
    else:
        facts = {name: metrics[name] for name in ("steps", "best_step", "seconds", "curve")}
        written = folder / "retriever"
        tables = [pq.read_table(written / f"candidates-{split}.parquet") for split in ("validation", "test")]
        columns = {"user": tables[0]["user"], "validation": tables[0]["rank"], "test": tables[1]["rank"]}
        columns["last_window"] = pa.array(_last_window_ranks(folder), pa.int32())
    said = {"dataset": dataset, "options": json.dumps(asdict(options)), "facts": json.dumps(facts)}
    table = pa.table(columns).replace_schema_metadata(said)
    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(table, partial, compression="zstd")
    partial.replace(path)
    reached = "pruned" if not columns else f"test Recall@10 {metrics['test']['Recall@10']:.4f}"
    print(f"{path.name}: {changed_options(options)} {reached}, {facts['steps']} steps", flush=True)


def _last_window_ranks(folder: Path) -> np.ndarray:
    model, options = load_retriever(folder / "retriever")
    data = load_data(folder)
    histories = [*map(np.append, data.training, data.validation)]
    sent = sent_histories(histories, replace(options, mask="last-window"))
    return rank_users(model, options.max_length, sent, data.test)


def changed_options(options: RetrieverTraining) -> dict[str, Any]:
    """What differs from the defaults."""
    standard = asdict(RetrieverTraining())
    return {name: value for name, value in asdict(options).items() if value != standard[name]}


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "tables"))
    parser.add_argument("--work", type=Path, default=ROOT / "artifacts" / "results", help="preprocessed data, weights")
    parser.add_argument("--dataset", action="append", choices=tuple(DATA), help="repeatable; all of them by default")
    given = parser.parse_args()
    if given.what == "train":
        given.work.mkdir(parents=True, exist_ok=True)
        train(given.work, given.dataset or tuple(DATA))
        return
    write_page(PAGE, load_runs(RANKS))


if __name__ == "__main__":
    main()
