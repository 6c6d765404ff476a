"""Reads and writes the Parquet files in ``docs/results/data``, from which every published figure is computed.

For the retrievers there is one file per run, with every user's ranks. For the rankers there is one file per retriever
with its lists for users whose true item is among the candidates (all such test users and a sample of such validation
users), and one file per run and way of scoring with the language model's log-probabilities of these candidates.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors.torch import save_file

from experiments.datasets import ROOT
from models.metrics import recall
from models.retriever.batches import Items
from models.retriever.options import RetrieverTraining
from models.retriever.trained import CONFIG, WEIGHTS, TrainedModel
from preprocessing.artifacts import replacing
from preprocessing.errors import InputError

PAGES = ROOT / "docs" / "results"
RETRIEVERS = PAGES / "data"
RANKERS = RETRIEVERS / "ranker"
LADDERS = RETRIEVERS / "ladder"
STATES = ROOT / "experiments" / "kept"
SPLITS = ("validation", "test")
LISTS_SCHEMA = pa.schema(
    {
        "split": pa.string(),
        "user": pa.string(),
        "truth": pa.int64(),
        "items": pa.list_(pa.int32()),
        "scores": pa.list_(pa.float32()),
        "popularity": pa.list_(pa.int32()),
        "nearness": pa.list_(pa.float32()),
        "signals": pa.list_(pa.list_(pa.float32())),
    }
)
SCORES_SCHEMA = pa.schema({"split": pa.string(), "user": pa.string(), "letters": pa.list_(pa.float32())})
"""The column ``letters`` holds log-probabilities, whichever verbalizer they come from."""
RANKS_SCHEMA = pa.schema({"user": pa.string()} | {name: pa.int32() for name in (*SPLITS, "last_window")})


@dataclass
class Lists:
    """The retriever's candidates, best first, for users of one split whose true item is among them."""

    users: list[str] = field(default_factory=list)
    truths: list[int] = field(default_factory=list)
    """Place (from 0) of the true item among the candidates."""
    items: list[Items] = field(default_factory=list)
    scores: list[NDArray[np.float32]] = field(default_factory=list)
    """The retriever's logits."""
    popularity: list[NDArray[np.int32]] = field(default_factory=list)
    """How often each candidate occurs in the training sequences."""
    likeness: list[NDArray[np.float32]] = field(default_factory=list)
    """TF-IDF similarity (0 to 1) of each candidate's title to the most similar title of the history."""
    signals: list[NDArray[np.float32]] = field(default_factory=list)
    """What each signal of the retrieval stage says of each candidate [k, signals]."""


@dataclass(frozen=True)
class RankerLists:
    """The lists that one retriever gives the rankers."""

    users: int
    """Number of all test users, including those whose true item is not among the candidates."""
    validation: Lists
    test: Lists

    def part(self, split: str) -> Lists:
        """Return the lists of the split of that name."""
        return self.test if split == "test" else self.validation


@dataclass
class Scores:
    """The language model's scores for the users of both splits, in the order of their lists."""

    splits: list[str] = field(default_factory=list)
    users: list[str] = field(default_factory=list)
    logprobs: list[NDArray[np.float32]] = field(default_factory=list)
    """Log-probabilities [k] of each user's candidates."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """How they were computed: ``seconds, seconds_a_request, runtime, run, options, way``."""

    def by_split(self) -> dict[str, list[NDArray[np.float32]]]:
        """Return the log-probabilities of each split's users."""
        rows = list(zip(self.splits, self.logprobs, strict=True))
        return {name: [row for split, row in rows if split == name] for name in SPLITS}


@dataclass(frozen=True)
class RetrieverRun:
    """A finished training of a retriever and the ranks that it gave every user; no ranks if it was pruned."""

    dataset: str
    options: dict[str, Any]
    facts: dict[str, Any]
    """``steps, best_step, seconds, curve``, and whether it was ``pruned``."""
    validation: NDArray[np.int32]
    test: NDArray[np.int32]
    last_window: NDArray[np.int32]
    """Test ranks when only the items that the model reads are masked, as in its authors' code."""

    @property
    def model(self) -> str:
        """The architecture, with its loss where there is a choice, and whether it reads titles."""
        loss = ", binary loss" if self.options["loss"] == "binary" else ""
        loss += ", sampled softmax" if self.options["negatives"] is not None else ""
        titles = "" if self.options["titles"] == "none" else ", titles"
        return f"{self.options['model']}{loss}{titles}"

    @property
    def pruned(self) -> bool:
        """Whether the training was given up early."""
        return bool(self.facts.get("pruned"))

    def reached_by(self, step: int) -> float:
        """Return the best validation Recall@10 up to a step."""
        return float(max(reached for at, _, reached in self.facts["curve"] if at <= step))

    def settings(self) -> dict[str, Any]:
        """Return everything but the seed and the device, to find the runs of one setting."""
        return {name: value for name, value in self.options.items() if name not in ("seed", "device")}


def lists_path(dataset: str, retriever: str, candidates: int) -> Path:
    """Return where a retriever's lists are kept."""
    return RANKERS / f"{dataset}-{retriever}-top{candidates}.parquet"


def scores_path(run: str, way: str) -> Path:
    """Return where the scores of the run of that name, computed in one way, are kept."""
    return RANKERS / f"{run}-{way}.parquet"


def ranks_path(dataset: str, options: RetrieverTraining) -> Path:
    """Return where the ranks of a retriever's run are kept."""
    changed = json.dumps(changed_options(options), sort_keys=True)
    settings = hashlib.sha256(changed.encode()).hexdigest()[:12]
    return RETRIEVERS / f"{dataset}-{options.model}-seed{options.seed}-{settings}.parquet"


def changed_options(options: RetrieverTraining) -> dict[str, Any]:
    """Return the options that differ from the defaults, whatever device the run used."""
    standard = asdict(RetrieverTraining(device=options.device))
    return {name: value for name, value in asdict(options).items() if value != standard[name]}


def ladder_path(dataset: str, seed: int) -> Path:
    """Return where the ranks of one data set's ladder with one seed are kept."""
    return LADDERS / f"{dataset}-seed{seed}.parquet"


def write_ladder(path: Path, users: list[str], rungs: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the ranks of every rung of a ladder.

    Args:
        path: see :func:`ladder_path`.
        users: raw user ids.
        rungs: for each rung by name the ranks [users] of both splits, and ``weights``.
    """
    columns: dict[str, Any] = {"user": users}
    for name, rung in rungs.items():
        columns |= {f"{name}: {split}": pa.array(rung[split], pa.int16()) for split in SPLITS}
    _write(path, pa.table(columns), {"weights": {name: rung["weights"] for name, rung in rungs.items()}})


def read_ladder(path: Path) -> dict[str, dict[str, Any]]:
    """Return, for each rung by name, the ranks [users] of both splits and the ``weights``."""
    table = pq.read_table(path)
    weights: dict[str, dict[str, float]] = json.loads(table.schema.metadata[b"weights"])
    return {
        name: {"weights": some, **{split: table[f"{name}: {split}"].to_numpy() for split in SPLITS}}
        for name, some in weights.items()
    }


def keep_state(name: str, trained: TrainedModel) -> Path:
    """Write a trained retriever in fp16 into experiments/kept, and return its folder.

    :meth:`TrainedModel.load` opens it, in fp32. Later experiments start from it where the weights of the published runs
    are not at hand; half precision changes hardly any rank.

    Args:
        name: name of the folder.
        trained: the retriever.
    """
    folder = STATES / name
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: tensor.half() for key, tensor in trained.model.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    config = {**asdict(trained.options), "items": trained.items}
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return folder


def write_untrained(
    path: Path, users: list[str], new: NDArray[np.bool_], ranks: Mapping[str, NDArray[np.int32]]
) -> None:
    """Write the ranks of the experiment with untrained items.

    Args:
        path: the file.
        users: raw user ids.
        new: whether each user's test item was taken out of training [users].
        ranks: each user's rank of the test item, by way of retrieval.
    """
    _write(path, pa.table({"user": users, "new": new, **{way: pa.array(ranks[way], pa.int16()) for way in ranks}}), {})


def read_untrained(path: Path) -> tuple[NDArray[np.bool_], dict[str, NDArray[np.int16]]]:
    """Return whether each user's test item was taken out of training, and the ranks by way of retrieval."""
    table = pq.read_table(path)
    ranks = {way: table[way].to_numpy() for way in table.column_names if way not in ("user", "new")}
    return table["new"].to_numpy(), ranks


def write_lists(path: Path, lists: RankerLists) -> None:
    """Write a retriever's lists."""
    columns: dict[str, list[Any]] = {name: [] for name in LISTS_SCHEMA.names}
    for split in SPLITS:
        part = lists.part(split)
        columns["split"] += [split] * len(part.users)
        columns["user"] += part.users
        columns["truth"] += part.truths
        columns["items"] += part.items
        columns["scores"] += part.scores
        columns["popularity"] += part.popularity
        columns["nearness"] += part.likeness
        columns["signals"] += [row.tolist() for row in part.signals]
    _write(path, pa.table(columns, LISTS_SCHEMA), {"facts": {"users": lists.users}})


def read_lists(path: Path) -> RankerLists:
    """Read what :func:`write_lists` wrote.

    Raises:
        InputError: the file is from a version that kept fewer columns.
    """
    table = pq.read_table(path)
    if missing := set(LISTS_SCHEMA.names) - set(table.column_names):
        raise InputError(f"{path} has no column {', '.join(missing)}: delete it and the scores of its lists")
    return RankerLists(_facts(table)["users"], **{split: _lists(table, split) for split in SPLITS})


def _lists(table: pa.Table, split: str) -> Lists:
    part = table.filter(np.equal(table["split"].to_pylist(), split))

    def arrays(name: str, dtype: type[np.generic]) -> list[NDArray[Any]]:
        return [np.array(row, dtype) for row in part[name].to_pylist()]

    return Lists(
        users=part["user"].to_pylist(),
        truths=part["truth"].to_pylist(),
        items=arrays("items", np.int32),
        scores=arrays("scores", np.float32),
        popularity=arrays("popularity", np.int32),
        likeness=arrays("nearness", np.float32),
        signals=arrays("signals", np.float32),
    )


def write_scores(path: Path, scores: Scores) -> None:
    """Write the scores of a run."""
    columns = {"split": scores.splits, "user": scores.users, "letters": scores.logprobs}
    _write(path, pa.table(columns, SCORES_SCHEMA), {"facts": scores.facts})


def read_scores(path: Path) -> Scores:
    """Read what :func:`write_scores` wrote."""
    table = pq.read_table(path)
    logprobs = [np.array(row, np.float32) for row in table["letters"].to_pylist()]
    return Scores(table["split"].to_pylist(), table["user"].to_pylist(), logprobs, _facts(table))


def write_ranks(
    path: Path, dataset: str, options: RetrieverTraining, facts: Mapping[str, Any], columns: Mapping[str, Any]
) -> None:
    """Write the ranks of a retriever's run.

    Args:
        path: see :func:`ranks_path`.
        dataset: name of the data set.
        options: how the retriever was trained.
        facts: see :class:`RetrieverRun`.
        columns: those of :data:`RANKS_SCHEMA`; none if the run was pruned.
    """
    table = pa.table(dict(columns), RANKS_SCHEMA) if columns else pa.table({})
    _write(path, table, {"dataset": dataset, "options": asdict(options), "facts": facts})


def read_retriever_runs(folder: Path) -> list[RetrieverRun]:
    """Read every kept run; options that did not exist yet when a run was made get their defaults."""
    runs = []
    for path in sorted(folder.glob("*.parquet")):
        table = pq.read_table(path)
        metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
        ranks = {
            name: table[name].to_numpy() if name in table.column_names else np.empty(0, np.int32)
            for name in (*SPLITS, "last_window")
        }
        options = asdict(RetrieverTraining(**json.loads(metadata["options"])))
        runs.append(RetrieverRun(metadata["dataset"], options, json.loads(metadata["facts"]), **ranks))
    return runs


def choose(runs: Sequence[RetrieverRun]) -> dict[str, list[RetrieverRun]]:
    """Return, for each model of one data set, the runs of the setting that validation chose, one for each seed.

    A setting is judged by its run with the first seed, so that more seeds give a setting no more chances.
    """
    chosen = {}
    by_model: dict[str, list[RetrieverRun]] = defaultdict(list)
    for run in runs:
        if not run.pruned:
            by_model[run.model].append(run)
    for model, found in by_model.items():
        first = min(run.options["seed"] for run in found)
        best = max((run for run in found if run.options["seed"] == first), key=lambda run: recall(run.validation, 10))
        chosen[model] = [run for run in found if run.settings() == best.settings()]
    return chosen


def _write(path: Path, table: pa.Table, metadata: Mapping[str, Any]) -> None:
    """Write a table; metadata other than text becomes JSON."""
    text = {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
    with replacing(path) as partial:
        pq.write_table(table.replace_schema_metadata(text), partial, compression="zstd")


def _facts(table: pa.Table) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(table.schema.metadata[b"facts"])
    return facts
