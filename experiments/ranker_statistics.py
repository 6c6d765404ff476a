"""Computes the rows of the ranker's tables and the bootstrap intervals of their differences.

Everything that is fitted (weights of the retriever and of other score sources) is fitted on validation users; rows hold
the ranks of test users.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.kept import SPLITS, Lists, RankerLists, lists_path, read_lists, read_scores
from experiments.ranker_runs import Run, runs_of
from models.conditional_logit import fit_pool
from models.metrics import summary
from models.ranker.fitting.fusion_fit import fit_fusion
from models.ranker.fusion import Floats, fused_ranks, log_softmax, true_places
from models.signals.signals import SIGNALS

Ranks = NDArray[np.int64]
Logprobs = Mapping[str, Sequence[NDArray[Any]]]
"""Scores of each user's candidates [k], by split."""
MAIN = "main: fused"
"""The label of what is served."""
SIMILARITY = "TF-IDF similarity of titles"
LANGUAGE_MODEL = "language model"
ALL_SIGNALS = "all signals of the retrieval stage"
CONTROLS = ("titles permuted", SIMILARITY)
"""The controls that the main configuration is compared with."""
VARIANT_LABELS = {
    "fewer-prompts": "2,400 prompts instead of 6,000",
    "large-steps": "2,400 prompts, twice the learning rate",
    "popular": "negatives drawn by popularity",
    "lists-only": "2,400 prompts, retriever's lists, in the retriever's order",
    "lists-shuffled": "2,400 prompts, retriever's lists, shuffled",
    "lists-behind": "2,400 prompts, the last third from the retriever's lists",
    "pool": "2,400 prompts, candidates drawn from the retrieval stage's best 200",
    "pool-behind": "2,400 prompts, the last third with candidates drawn from the retrieval stage's best 200",
    "letters": "2,400 prompts, letter verbalizer as in the paper",
    "deep": "2,400 prompts, 24 layers instead of 12, adapters on the upper 12 of them",
    "all-prompts": "all training prompts, batches of 16, on a GPU",
    "all-prompts-letters": "all training prompts, batches of 16, letter verbalizer, 30 layers, on a GPU",
}


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    label: str
    ranks: list[Ranks]
    """For each seed the places (from 1) of the test users' true items."""
    weights: list[float]
    """For each seed the weight of the retriever."""
    seconds: float | None = None
    """Time per request."""


@dataclass(frozen=True)
class Results:
    """The results of one data set and retriever."""

    dataset: str
    retriever: str
    lists: RankerLists
    rows: list[Row]
    """The first is the retriever alone."""
    seeds: list[Logprobs]
    """The scores of the main configuration, for each seed."""

    def row(self, label: str) -> Row | None:
        """Return the row with this label, if there is one."""
        return next((row for row in self.rows if row.label == label), None)


def retriever_row(lists: RankerLists) -> Row:
    """Return the row of the retriever alone."""
    return Row("retriever", [np.array(lists.test.truths) + 1], [1.0])


def alone_row(label: str, lists: RankerLists, seeds: Sequence[Logprobs], seconds: float | None = None) -> Row:
    """Return the row of the language model alone, which is how the paper ranks."""
    ranks = [fused_ranks(seed["test"], lists.test.scores, lists.test.truths, 0.0) for seed in seeds]
    return Row(label, ranks, [0.0] * len(ranks), seconds)


def fused_row(label: str, lists: RankerLists, seeds: Sequence[Logprobs], seconds: float | None = None) -> Row:
    """Return the row of each seed's language model fused with the retriever, with weights fitted on validation."""
    ranks, weights = [], []
    for seed in seeds:
        weight, _ = fit_fusion(seed["validation"], lists.validation.scores, lists.validation.truths)
        ranks.append(fused_ranks(seed["test"], lists.test.scores, lists.test.truths, weight))
        weights.append(weight)
    return Row(label, ranks, weights, seconds)


def combined_row(lists: RankerLists, seeds: Sequence[Logprobs], sources: Sequence[str]) -> Row:
    """Return the row of several score sources, each with its own weight, fitted on validation for each seed."""
    ranks = []
    for logprobs in seeds:
        by_source: dict[str, list[Logprobs]] = {
            "retriever": [{split: lists.part(split).scores for split in SPLITS}],
            "popularity": [popularity_scores(lists)],
            "title similarity": [similarity_scores(lists)],
            ALL_SIGNALS: signal_scores(lists),
            LANGUAGE_MODEL: [logprobs],
        }
        chosen = [scores for name in sources for scores in by_source[name]]
        validation, test = (
            np.stack([log_softmax(np.stack(scores[split])) for scores in chosen], axis=-1) for split in SPLITS
        )  # [users, k, chosen]
        weights = fit_pool(list(validation), lists.validation.truths)
        ranks.append(true_places(test @ weights, lists.test.truths))
    return Row(", ".join(sources), ranks, [])


def popularity_scores(lists: RankerLists) -> Logprobs:
    """Return the logarithms of the candidates' counts in training, to take the place of a language model."""
    return _scores(lists, lambda part: [np.log1p(row.astype(np.float64)) for row in part.popularity])


def similarity_scores(lists: RankerLists) -> Logprobs:
    """Return the TF-IDF similarity of the candidates' titles, to take the place of a language model."""
    return _scores(lists, lambda part: [row.astype(np.float64) for row in part.likeness])


def signal_scores(lists: RankerLists) -> list[Logprobs]:
    """Return what each signal of the retrieval stage says of the candidates."""

    def of_signal(number: int) -> Logprobs:
        return _scores(lists, lambda part: [row[:, number].astype(np.float64) for row in part.signals])

    return [of_signal(number) for number in range(len(SIGNALS))]


def _scores(lists: RankerLists, of_part: Callable[[Lists], list[Floats]]) -> Logprobs:
    return {split: of_part(lists.part(split)) for split in SPLITS}


def results_of(dataset: str, retriever: str) -> Results:
    """Return every row that the kept scores of a data set and retriever give."""
    lists = read_lists(lists_path(dataset, retriever, 20))
    main = runs_of(dataset, retriever, "main")

    def alone_and_fused(label: str, way: str, runs: Sequence[Run]) -> list[Row]:
        seeds, seconds = _kept(way, runs)
        if not seeds:
            return []
        return [
            alone_row(f"{label}: alone", lists, seeds, seconds),
            fused_row(f"{label}: fused", lists, seeds, seconds),
        ]

    def fused(label: str, way: str, runs: Sequence[Run]) -> list[Row]:
        seeds, seconds = _kept(way, runs)
        return [fused_row(label, lists, seeds, seconds)] if seeds else []

    rows = [retriever_row(lists)]
    rows += alone_and_fused("main", "tuned", main)
    rows += alone_and_fused("main, averaged over four candidate orders", "orders", main)
    for variant, label in VARIANT_LABELS.items():
        runs = runs_of(dataset, retriever, variant)
        rows += alone_and_fused(label, "tuned", runs)
        rows += fused(f"{label}, titles permuted: fused", "permuted", runs)
    rows += fused("control: titles permuted, fused", "permuted", main)
    rows += fused("control: untuned base (letters), fused", "untuned", main)
    rows.append(fused_row("control: popularity in training, fused", lists, [popularity_scores(lists)]))
    rows.append(fused_row(f"control: {SIMILARITY}, fused", lists, [similarity_scores(lists)]))
    return Results(dataset, retriever, lists, rows, _kept("tuned", main)[0])


def kept_trainings(dataset: str, retriever: str) -> dict[str, list[Logprobs]]:
    """Return, by label, the kept scores of every training and of the controls that use the language model."""
    main = runs_of(dataset, retriever, "main")
    found = {"main": _kept("tuned", main)[0]}
    for variant, label in VARIANT_LABELS.items():
        found[label] = _kept("tuned", runs_of(dataset, retriever, variant))[0]
    found["control: titles permuted"] = _kept("permuted", main)[0]
    found["control: untuned base (letters)"] = _kept("untuned", main)[0]
    return {label: seeds for label, seeds in found.items() if seeds}


def _kept(way: str, runs: Sequence[Run]) -> tuple[list[Logprobs], float | None]:
    """Return the kept scores of each run, and their mean seconds per request."""
    paths = [run.files()[way] for run in runs if way in run.ways]
    found = [read_scores(path) for path in paths if path.exists()]
    seconds = float(np.mean([scores.facts["seconds_a_request"] for scores in found])) if found else None
    return [scores.by_split() for scores in found], seconds


def gains(ranks: Sequence[Ranks], k: int = 10) -> NDArray[np.float64]:
    """Return each user's NDCG@k, averaged over the seeds."""
    each = [np.where(row <= k, 1 / np.log2(row + 1.0), 0.0) for row in ranks]
    mean: NDArray[np.float64] = np.mean(each, axis=0)
    return mean


def reciprocals(ranks: Sequence[Ranks], k: int = 5) -> NDArray[np.float64]:
    """Return each user's reciprocal rank, 0 beyond ``k``, averaged over the seeds."""
    mean: NDArray[np.float64] = np.mean([np.where(row <= k, 1.0 / row, 0.0) for row in ranks], axis=0)
    return mean


def averaged(ranks: Sequence[Ranks]) -> dict[str, float]:
    """Return the six metrics of the paper, averaged over the seeds."""
    rows = [summary(row) for row in ranks]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
