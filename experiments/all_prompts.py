"""Trains a ranker on every training prompt of a data set, and keeps its scores and its adapter.

    python -m experiments.all_prompts ml-latest-small lines --artifacts DIR --result FILE

This takes a GPU: Beauty has 131,219 training prompts. `python -m benchmarks.device` runs it as a section. The scores
and the adapter are written beside the result. Scores that are moved to docs/results/data/ranker become rows of
docs/results/ranker.md with `make results-ranker`.
"""

import argparse
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.datasets import SOURCES
from experiments.kept import Lists, RankerLists, Scores, lists_path, read_lists, read_scores
from experiments.ranker_runs import Run
from experiments.ranker_scores import find_lists, keep_scores
from experiments.ranker_statistics import fused_row, gains, retriever_row
from models.ranker.base import EMBEDDED
from models.ranker.options import RankerTraining
from models.ranker.training import ADAPTER_FOLDER, train_ranker
from preprocessing.artifacts import replacing
from preprocessing.data import load_data
from preprocessing.errors import InputError

VARIANTS = {"lines": "all-prompts", "letters": "all-prompts-letters"}
DRY_USERS = 2


def main() -> None:
    """Train, score, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=SOURCES)
    parser.add_argument("read", choices=VARIANTS)
    parser.add_argument(
        "--artifacts", type=Path, required=True, help="Folder of any data set; that of the chosen one stands beside it."
    )
    parser.add_argument("--bases", type=Path, required=True, help="Folder for the converted embedded base.")
    parser.add_argument("--work", type=Path, required=True, help="Folder for weights and checkpoints.")
    parser.add_argument("--result", type=Path, required=True, help="JSON file for the result.")
    parser.add_argument("--dry-run", action="store_true", help="Take 12 prompts of --artifacts, on the processor.")
    given = parser.parse_args()
    run = Run(given.dataset, variant=VARIANTS[given.read], device="cpu" if given.dry_run else "gpu")
    source = given.artifacts if given.dry_run else given.artifacts.parent / given.dataset
    try:
        result = execute(run, source, given.bases, given.work, given.result.parent, dry_run=given.dry_run)
    except InputError as error:
        parser.error(str(error))
    with replacing(given.result) as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def execute(
    run: Run, source: Path, bases: Path, work: Path, output: Path, *, dry_run: bool, base: str = EMBEDDED
) -> dict[str, Any]:
    """Train a run, write its scores and its adapter to ``output``, and return its figures.

    Args:
        run: the run.
        source: folder with the data and the retriever of its data set.
        bases: folder with the converted embedded base.
        work: folder for weights and checkpoints.
        output: folder for the files that are kept.
        dry_run: whether to train on 12 prompts and score few users.
        base: the base model.
    """
    if not (source / "retriever").is_dir():
        raise InputError(f"{source} holds no retriever: run `llamarec preprocess` and `llamarec train-retriever` there")
    folder = work / run.name
    folder.mkdir(parents=True, exist_ok=True)
    for name, target in {"data": source / "data", "retriever": source / "retriever", "base": bases}.items():
        if not (folder / name).exists():
            (folder / name).symlink_to(target.resolve())
    options = briefly(run.options()) if dry_run else run.options()
    data = load_data(folder)
    started = time.perf_counter()
    metrics = train_ranker(options, folder, base)
    trained = time.perf_counter() - started
    lists = first_users(find_lists(folder / "retriever", data, 20)) if dry_run else kept_lists(run)
    path = output / run.files()["tuned"].name
    keep_scores(path, run, "tuned", folder, data, lists)
    shutil.copytree(folder / "ranker" / ADAPTER_FOLDER, output / f"{run.name}-adapter", dirs_exist_ok=True)
    return {
        "options": asdict(options),
        "training_seconds": trained,
        "metrics": metrics,
        "test": test_figures(lists, read_scores(path)),
    }


def briefly(options: RankerTraining) -> RankerTraining:
    """Return options of a training of three steps."""
    return replace(
        options, depth=2, max_prompts=12, batch_size=4, micro_batch_size=4, validation_users=DRY_USERS, validate_every=3
    )


def kept_lists(run: Run) -> RankerLists:
    """Return the retriever's lists, for which every other ranker's scores are kept too."""
    return read_lists(lists_path(run.dataset, run.retriever, run.options().candidates))


def first_users(lists: RankerLists) -> RankerLists:
    """Return the lists of a few users."""

    def first(part: Lists) -> Lists:
        return Lists(**{name: value[:DRY_USERS] for name, value in vars(part).items()})

    return RankerLists(lists.users, validation=first(lists.validation), test=first(lists.test))


def test_figures(lists: RankerLists, scores: Scores) -> Mapping[str, float]:
    """Return NDCG@10 of the retriever and of the fused ranking, on the test users whose true item is in their list."""
    rows = {"retriever": retriever_row(lists), "fused": fused_row("fused", lists, [scores.by_split()])}
    return {f"NDCG@10, {name}": float(np.mean(gains(row.ranks))) for name, row in rows.items()}


if __name__ == "__main__":
    main()
