"""Quality of the retrievers beside the paper's: trains the runs below and keeps every user's ranks.

    python -m benchmarks.retrievers train     # make retrain-retrievers: hours; a run whose ranks are there is left out
    python -m benchmarks.retrievers tables    # make results-retrievers: docs/results/retrievers.md from the ranks

Settings are chosen by validation Recall@10 alone; the tables report the test split of what was chosen.
"""

import argparse
import hashlib
import json
import tempfile
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from models.metrics import recall, summary
from models.retriever.training import RetrieverTraining, train_retriever
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
RUNS: list[tuple[str, dict[str, Any]]] = [
    *(("ml-latest-small", {**ML, "dropout": dropout, "weight_decay": 0.01}) for dropout in (0.2, 0.3, 0.4, 0.5, 0.1)),
    *(("ml-latest-small", {**ML, "model": "sasrec", "dropout": dropout}) for dropout in (0.2, 0.4, 0.6)),
    *(("ml-latest-small", {**ML, "model": "narm", "blocks": 1, "dropout": dropout}) for dropout in (0.25, 0.5)),
    *(("ml-latest-small", {**ML, "model": "bert4rec", "heads": 2, "dropout": dropout}) for dropout in (0.1, 0.2)),
]
"""Data set and what differs from the defaults of :class:`RetrieverTraining`, in the order of training."""
PAPER = {
    ("ml-latest-small", "lrurec"): (0.0491, 0.0705, 0.1426),
    ("ml-latest-small", "sasrec"): (0.0378, 0.0522, 0.0993),
    ("ml-latest-small", "bert4rec"): (0.0244, 0.0366, 0.0785),
    ("ml-latest-small", "narm"): (0.0332, 0.0441, 0.0801),
    ("amazon-2014-beauty", "lrurec"): (0.0417, 0.0533, 0.0916),
    ("amazon-2014-beauty", "sasrec"): (0.0371, 0.0481, 0.0844),
    ("amazon-2014-beauty", "bert4rec"): (0.0276, 0.0372, 0.0686),
    ("amazon-2014-beauty", "narm"): (0.0321, 0.0420, 0.0746),
}
"""MRR@10, NDCG@10 and Recall@10 of the paper's Table 1."""
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"


@dataclass(frozen=True)
class Run:
    """A finished training and the ranks it gave every user."""

    dataset: str
    options: dict[str, Any]
    facts: dict[str, Any]
    validation: np.ndarray
    test: np.ndarray


def ranks_path(dataset: str, options: RetrieverTraining) -> Path:
    """Where the ranks of a run are kept."""
    settings = hashlib.sha256(json.dumps(asdict(options), sort_keys=True).encode()).hexdigest()[:12]
    return RANKS / f"{dataset}-{options.model}-seed{options.seed}-{settings}.parquet"


def train(work: Path) -> None:
    """Trains every run whose ranks are not there yet; checkpoints and weights stay in ``work``."""
    for dataset, changed in RUNS:
        options = RetrieverTraining(**changed)
        path = ranks_path(dataset, options)
        if path.exists():
            continue
        preprocess(DATA[dataset], work / dataset)
        with tempfile.TemporaryDirectory(dir=work) as folder:
            (Path(folder) / "data").symlink_to((work / dataset / "data").resolve())
            metrics = train_retriever(options, Path(folder))
            written = Path(folder) / "retriever"
            tables = [pq.read_table(written / f"candidates-{split}.parquet") for split in ("validation", "test")]
        facts = {name: metrics[name] for name in ("steps", "best_step", "seconds")}
        columns = {"user": tables[0]["user"], "validation": tables[0]["rank"], "test": tables[1]["rank"]}
        said = {"dataset": dataset, "options": json.dumps(asdict(options)), "facts": json.dumps(facts)}
        table = pa.table(columns).replace_schema_metadata(said)
        RANKS.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, compression="zstd")
        print(f"{path.name}: test Recall@10 {metrics['test']['Recall@10']:.4f}", flush=True)


def load_runs() -> list[Run]:
    """Every kept run."""
    runs = []
    for path in sorted(RANKS.glob("*.parquet")):
        table = pq.read_table(path)
        said = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
        ranks = (table[split].to_numpy() for split in ("validation", "test"))
        runs.append(Run(said["dataset"], json.loads(said["options"]), json.loads(said["facts"]), *ranks))
    return runs


def tables(runs: list[Run]) -> str:
    """Markdown: for each data set what validation chose, beside the paper, and every run that it chose among."""
    lines = []
    for dataset in dict.fromkeys(run.dataset for run in runs):
        by_model = defaultdict(list)
        for run in runs:
            if run.dataset == dataset:
                by_model[run.options["model"]].append(run)
        names = list(summary([1]))
        lines += [f"## {dataset}", "", f"| model | {' | '.join(names)} | paper's MRR@10 / NDCG@10 / Recall@10 |"]
        lines += ["|---" * (len(names) + 2) + "|"]
        chosen = {name: max(found, key=lambda run: recall(run.validation, 10)) for name, found in by_model.items()}
        for name, run in chosen.items():
            figures = " | ".join(f"{value:.4f}" for value in summary(run.test).values())
            paper = " / ".join(f"{value:.4f}" for value in PAPER[dataset, name])
            lines.append(f"| {name} | {figures} | {paper} |")
        lines += ["", "Users whose item is among the retriever's own top 20:", ""]
        lines += [f"| model | users | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
        for name, run in chosen.items():
            found = run.test[(run.test >= 1) & (run.test <= 20)]
            figures = " | ".join(f"{value:.4f}" for value in summary(found).values())
            lines.append(f"| {name} | {len(found):,} ({recall(run.test, 20):.4f}) | {figures} |")
        lines += ["", "Every run, and what was chosen by:", ""]
        columns = ("dropout", "weight_decay", "learning_rate", "batch_size", "max_length", "seed")
        lines += [f"| model | {' | '.join(columns)} | best step | seconds | validation Recall@10 | |"]
        lines += ["|---" * (len(columns) + 5) + "|"]
        for name, found in by_model.items():
            for run in found:
                settings = " | ".join(str(run.options[column]) for column in columns)
                facts = f"{run.facts['best_step']} | {run.facts['seconds']:.0f}"
                mark = "chosen" if run is chosen[name] else ""
                lines.append(f"| {name} | {settings} | {facts} | {recall(run.validation, 10):.4f} | {mark} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "tables"))
    parser.add_argument("--work", type=Path, default=ROOT / "artifacts" / "results", help="preprocessed data, weights")
    given = parser.parse_args()
    if given.what == "train":
        given.work.mkdir(parents=True, exist_ok=True)
        train(given.work)
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables(load_runs())}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
