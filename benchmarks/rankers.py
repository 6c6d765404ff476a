"""Quality of the ranker beside its retriever, its controls and the paper.

    python -m benchmarks.rankers train     # make retrain-ranker: a queue of runs; what is kept is left out
    python -m benchmarks.rankers tables    # make results-ranker: docs/results/ranker.md from what is kept

Everything that is chosen (the retriever's weight) is chosen on validation users; the tables report test users. A
training that reaches its bound in time is stopped; the next call goes on from its checkpoint.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.stats import bootstrap as resampled

from benchmarks.ranker_runs import KEPT, ROOT, RUNS, Run, execute, lists_path
from benchmarks.retriever_tables import PAPER, PAPER_SUBSET
from models.metrics import summary
from models.ranker.fitting.fusion_fit import fit_fusion, fit_pool
from models.ranker.fusion import fused_ranks, log_softmax, ndcg_by_weight, true_places

PAGE = ROOT / "docs" / "results" / "ranker.md"
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
Ranks = NDArray[np.int64]
LLAMAREC_SUBSET = {
    "ml-latest-small": (0.2184, 0.2693, 0.4227, 0.2623, 0.3766, 0.7560),
    "amazon-2014-beauty": (0.3016, 0.3524, 0.5071, 0.3350, 0.4337, 0.7600),
}
"""Of the paper's Table 3, in the order of :func:`models.metrics.summary`."""
LLAMAREC = {
    "ml-latest-small": (0.0440, 0.0543, 0.0852, 0.0529, 0.0759, 0.1524),
    "amazon-2014-beauty": (0.0385, 0.0450, 0.0648, 0.0428, 0.0554, 0.0971),
}
"""Of its Table 1."""
REPORTED = {
    "P5": ("0.0367", "0.0493", "0.0416", "0.0645"),
    "PALR": ("n/a", "n/a", "0.0446", "0.0721"),
    "GPT4Rec": ("n/a", "0.0653", "n/a", "0.0810"),
    "RecMind": ("0.0289", "0.0415", "0.0375", "0.0574"),
    "POD": ("0.0395", "0.0537", "0.0443", "0.0688"),
    "LlamaRec, 7B": ("0.0450", "0.0648", "0.0554", "0.0971"),
}
"""The paper's Table 4: NDCG@5, Recall@5, NDCG@10 and Recall@10 on Beauty."""
ABLATIONS = {
    "fewer-prompts": "2,400 prompts instead of 6,000",
    "large-steps": "2,400 prompts, steps twice as large",
    "popular": "negatives drawn by popularity",
    "lists-only": "2,400 prompts, the retriever's lists in its order",
    "lists-shuffled": "2,400 prompts, the retriever's lists, shuffled",
    "lists-behind": "2,400 prompts, the last third the retriever's lists",
    "letters": "2,400 prompts, letters read as in the paper",
    "deep": "2,400 prompts, 24 layers instead of 12, adapters on the upper 12",
}
LIKENESS = "likeness of the titles' words (TF-IDF)"
CONTROLS = ("titles permuted", LIKENESS)
"""With which the main configuration is compared."""
READ = ("scores", "popularity", "nearness")
"""Of each candidate: the retriever's score, its count in training, the likeness of its title (0 to 1)."""


@dataclass(frozen=True)
class Split:
    """The users of a split whose true item is among the candidates."""

    truths: list[int]
    scores: list[NDArray[np.float32]]
    popularity: list[NDArray[np.int32]]
    nearness: list[NDArray[np.float32]]


@dataclass(frozen=True)
class Kept:
    """What is kept of one retriever's lists."""

    users: int
    """All test users, with those whose true item is not among the candidates."""
    validation: Split
    test: Split


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    label: str
    ranks: list[Ranks]
    """Of the test users' true items, for each seed."""
    weights: list[float]
    """Of the retriever, for each seed."""
    seconds: float | None = None
    """Of one request."""


def load_lists(path: Path) -> Kept:
    """Reads what :func:`benchmarks.ranker_runs.keep_lists` wrote."""
    table = pq.read_table(path)
    splits = {}
    for split in ("validation", "test"):
        part = table.filter(np.equal(table["split"].to_pylist(), split))
        arrays = {name: [np.array(row) for row in part[name].to_pylist()] for name in READ}
        splits[split] = Split(part["truth"].to_pylist(), **arrays)
    return Kept(facts(table)["users"], **splits)


def facts(table: Any) -> dict[str, Any]:
    """What was written beside a table."""
    found: dict[str, Any] = json.loads(table.schema.metadata[b"facts"])
    return found


def load_kept(path: Path) -> tuple[dict[str, list[NDArray[np.float32]]], dict[str, Any]]:
    """The language model's log-probabilities of both splits, and what was written beside them."""
    table = pq.read_table(path)
    logprobs: dict[str, list[NDArray[np.float32]]] = {"validation": [], "test": []}
    for split, row in zip(table["split"].to_pylist(), table["letters"].to_pylist(), strict=True):
        logprobs[split].append(np.array(row, np.float32))
    return logprobs, facts(table)


def fused_row(label: str, kept: Kept, logprobs: Sequence[dict[str, Any]], seconds: float | None = None) -> Row:
    """The language model of each seed, fused with the retriever by the weight that is fitted on validation."""
    ranks, weights = [], []
    for seed in logprobs:
        weight, _ = fit_fusion(seed["validation"], kept.validation.scores, kept.validation.truths)
        ranks.append(fused_ranks(seed["test"], kept.test.scores, kept.test.truths, weight))
        weights.append(weight)
    return Row(label, ranks, weights, seconds)


def alone_row(label: str, kept: Kept, logprobs: Sequence[dict[str, Any]], seconds: float | None = None) -> Row:
    """The language model alone, the paper's way."""
    ranks = [fused_ranks(seed["test"], kept.test.scores, kept.test.truths, 0.0) for seed in logprobs]
    return Row(label, ranks, [0.0] * len(ranks), seconds)


def popularity_kept(kept: Kept) -> dict[str, list[NDArray[np.float64]]]:
    """Log-counts of the candidates in training, in the place of a language model."""
    return {
        name: [np.log1p(row.astype(np.float64)) for row in getattr(kept, name).popularity]
        for name in ("validation", "test")
    }


def likeness_kept(kept: Kept) -> dict[str, list[NDArray[np.float64]]]:
    """How alike titles are by their words, in the place of a language model."""
    return {name: [row.astype(np.float64) for row in getattr(kept, name).nearness] for name in ("validation", "test")}


def gains(ranks: Sequence[Ranks], k: int = 10) -> NDArray[np.float64]:
    """Each user's NDCG@k, averaged over the seeds."""
    each = [np.where(row <= k, 1 / np.log2(row + 1.0), 0.0) for row in ranks]
    mean: NDArray[np.float64] = np.mean(each, axis=0)
    return mean


def reciprocals(ranks: Sequence[Ranks], k: int = 5) -> NDArray[np.float64]:
    """Each user's reciprocal rank, 0 beyond ``k``, averaged over the seeds."""
    mean: NDArray[np.float64] = np.mean([np.where(row <= k, 1.0 / row, 0.0) for row in ranks], axis=0)
    return mean


def bootstrap(differences: NDArray[np.float64], repeats: int = 5000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of the users' paired differences and its 95 % interval: percentiles over users drawn with repetition."""
    rng = np.random.default_rng(seed)
    drawn = resampled((differences,), np.mean, n_resamples=repeats, batch=100, method="percentile", random_state=rng)
    low, high = drawn.confidence_interval
    return float(differences.mean()), float(low), float(high)


def interval(differences: NDArray[np.float64]) -> str:
    """Mean difference and its 95 % interval, as the tables show them."""
    return "{:+.4f} [{:+.4f}, {:+.4f}]".format(*bootstrap(differences))


def averaged(ranks: Sequence[Ranks]) -> list[float]:
    """The six metrics, averaged over the seeds."""
    return [float(value) for value in np.mean([list(summary(row).values()) for row in ranks], axis=0)]


def runs_of(dataset: str, retriever: str, variant: str) -> list[Run]:
    """The seeds of one configuration."""
    return [run for run in RUNS if (run.dataset, run.retriever, run.variant) == (dataset, retriever, variant)]


def rows_of(dataset: str, retriever: str) -> tuple[Kept, list[Row]]:
    """Every line that the kept files of a data set and retriever give; the first is the retriever alone."""
    kept = load_lists(lists_path(dataset, retriever, 20))
    alone = Row("retriever", [np.array(kept.test.truths) + 1], [1.0])
    rows = [alone]
    main = runs_of(dataset, retriever, "main")

    def read(way: str, runs: Sequence[Run] = main) -> tuple[list[dict[str, Any]], float | None]:
        paths = [run.files()[way] for run in runs if way in run.ways and run.files()[way].exists()]
        found = [load_kept(path) for path in paths]
        seconds = float(np.mean([said["seconds_a_request"] for _, said in found])) if found else None
        return [logprobs for logprobs, _ in found], seconds

    for way, label in (("tuned", "main"), ("orders", "main, four orders averaged")):
        logprobs, seconds = read(way)
        if logprobs:
            rows.append(alone_row(f"{label}: alone", kept, logprobs, seconds))
            rows.append(fused_row(f"{label}: fused", kept, logprobs, seconds))
    for variant, label in ABLATIONS.items():
        runs = runs_of(dataset, retriever, variant)
        logprobs, seconds = read("tuned", runs)
        if logprobs:
            rows.append(alone_row(f"{label}: alone", kept, logprobs, seconds))
            rows.append(fused_row(f"{label}: fused", kept, logprobs, seconds))
        logprobs, seconds = read("permuted", runs)
        if logprobs:
            rows.append(fused_row(f"{label}, titles permuted: fused", kept, logprobs, seconds))
    for way, label in (("permuted", "control: titles permuted"), ("untuned", "control: untuned base")):
        logprobs, seconds = read(way)
        if logprobs:
            rows.append(fused_row(f"{label}, fused", kept, logprobs, seconds))
    rows.append(fused_row("control: popularity, fused", kept, [popularity_kept(kept)]))
    rows.append(fused_row(f"control: {LIKENESS}, fused", kept, [likeness_kept(kept)]))
    return kept, rows


def table(kept: Kept, rows: Sequence[Row], paper: Mapping[str, Sequence[float]]) -> list[str]:
    """Markdown of the paper's Table 3 for these rows, each with its difference from the first."""
    names = list(summary([1]))
    lines = [
        f"| | seeds | {' | '.join(names)} | NDCG@10 to the retriever's [95 %] | MRR@5 | weight | s a request |",
        "|---" * (len(names) + 6) + "|",
    ]
    for row in rows:
        figures = " | ".join(f"{value:.4f}" for value in averaged(row.ranks))
        if row is rows[0]:
            lines.append(f"| {row.label} | | {figures} | | | | |")
            continue
        differences = [interval(measure(row.ranks) - measure(rows[0].ranks)) for measure in (gains, reciprocals)]
        weights = ", ".join(f"{weight:.2f}" for weight in row.weights)
        seconds = "" if row.seconds is None else f"{row.seconds:.2f}"
        lines.append(
            f"| {row.label} | {len(row.ranks)} | {figures} | {' | '.join(differences)} | {weights} | {seconds} |"
        )
    for name, values in paper.items():
        lines.append(f"| *the paper's {name}* | | {' | '.join(f'{value:.4f}' for value in values)} | | | | |")
    return lines


def overall(kept: Kept, rows: Sequence[Row], paper: Mapping[str, Sequence[float]]) -> list[str]:
    """Markdown of the paper's Table 1: users whose true item is not among the candidates count 0."""
    names = list(summary([1]))
    share = len(kept.test.truths) / kept.users
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [
        f"| {row.label} | {' | '.join(f'{value * share:.4f}' for value in averaged(row.ranks))} |" for row in rows
    ]
    for name, values in paper.items():
        lines.append(f"| *the paper's {name}* | {' | '.join(f'{value:.4f}' for value in values)} |")
    return lines


def reported(kept: Kept, row: Row) -> list[str]:
    """Markdown of the paper's Table 4 with a row of ours."""
    share = len(kept.test.truths) / kept.users
    figures = dict(zip(summary([1]), averaged(row.ranks), strict=True))
    lines = ["| | NDCG@5 | Recall@5 | NDCG@10 | Recall@10 |", "|---|---|---|---|---|"]
    lines += [f"| {name} (reported) | {' | '.join(values)} |" for name, values in REPORTED.items()]
    ours = " | ".join(f"{figures[name] * share:.4f}" for name in ("NDCG@5", "Recall@5", "NDCG@10", "Recall@10"))
    return [*lines, f"| ours, {row.label} | {ours} |"]


def pooled_row(kept: Kept, seeds: Sequence[Mapping[str, Any]], opinions: Sequence[str]) -> Row:
    """Several opinions on the candidates, each weighed by itself, fitted on validation for each seed."""
    ranks = []
    for logprobs in seeds:
        said = {
            "retriever": {"validation": kept.validation.scores, "test": kept.test.scores},
            "popularity": popularity_kept(kept),
            "words": likeness_kept(kept),
            "language model": logprobs,
        }
        validation, test = (
            np.stack([log_softmax(np.stack(said[name][split])) for name in opinions], axis=-1)  # [users, k, opinions]
            for split in ("validation", "test")
        )
        ranks.append(true_places(test @ fit_pool(list(validation), kept.validation.truths), kept.test.truths))
    return Row(", ".join(opinions), ranks, [])


def pools(kept: Kept, seeds: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown of what sets of opinions are worth, and what the language model adds to each."""
    alone = gains([np.array(kept.test.truths) + 1])
    lines = [
        "| opinions | to the retriever's NDCG@10 | with the language model too | what it adds |",
        "|---|---|---|---|",
    ]
    for others in ((), ("popularity",), ("words",), ("popularity", "words")):
        row = pooled_row(kept, seeds, ["retriever", *others])
        without = gains(row.ranks)
        along = gains(pooled_row(kept, seeds, ["retriever", *others, "language model"]).ranks)
        cells = [interval(without - alone) if others else "", interval(along - alone), interval(along - without)]
        lines.append(f"| {row.label} | {' | '.join(cells)} |")
    return lines


def beyond_letters(dataset: str) -> list[str]:
    """Markdown of the main ranker reading 50 candidates, beside the retriever on the same 50."""
    run = next(run for run in RUNS if (run.dataset, run.variant) == (dataset, "fifty-candidates"))
    path = run.files()["tuned"]
    if not path.exists():
        return []
    kept = load_lists(lists_path(dataset, run.retriever, 50))
    logprobs, said = load_kept(path)
    rows = [
        Row("retriever", [np.array(kept.test.truths) + 1], [1.0]),
        alone_row("main: alone", kept, [logprobs], said["seconds_a_request"]),
        fused_row("main: fused", kept, [logprobs], said["seconds_a_request"]),
    ]
    heading = f"The same ranker reading 50 candidates, {len(kept.test.truths):,} users whose item is among them:"
    return ["", heading, "", *table(kept, rows, {}), ""]


def plot_weights(dataset: str, path: Path) -> None:
    """NDCG@10 of the first main run against the retriever's weight, on validation (where it is chosen) and test."""
    from matplotlib.figure import Figure

    run = next(run for run in runs_of(dataset, "lrurec", "main") if run.files()["tuned"].exists())
    kept, (logprobs, _) = load_lists(lists_path(dataset, run.retriever, 20)), load_kept(run.files()["tuned"])
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    for name in ("validation", "test"):
        split = getattr(kept, name)
        by_weight = ndcg_by_weight(logprobs[name], split.scores, split.truths)
        axes.plot(list(by_weight), list(by_weight.values()), marker="o", markersize=3, label=name)
    axes.set(xlabel="weight of the retriever (1: retriever alone)", ylabel="NDCG@10", title=dataset)
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})


def tables() -> str:
    """Markdown of everything that is kept; a sentence where nothing is."""
    lines: list[str] = []
    for dataset, retriever in dict.fromkeys((run.dataset, run.retriever) for run in RUNS):
        if not lists_path(dataset, retriever, 20).exists():
            continue
        kept, rows = rows_of(dataset, retriever)
        subset = f"{len(kept.test.truths):,} of {kept.users:,} test users have their item among the candidates."
        lines += [f"## {dataset}, {retriever}", "", subset, ""]
        paper = retriever == "lrurec"
        subset_figures = {"LRURec": PAPER_SUBSET[dataset]["lrurec"], "LlamaRec, 7B": LLAMAREC_SUBSET[dataset]}
        figures = {"LRURec": PAPER[dataset]["lrurec"], "LlamaRec, 7B": LLAMAREC[dataset]}
        lines += [*table(kept, rows, subset_figures if paper else {}), "", "All test users:", ""]
        lines += [*overall(kept, rows[:3], figures if paper else {}), ""]
        by_label = {row.label: row for row in rows}
        served = by_label.get("main: fused")
        for label in CONTROLS:
            if served and (control := by_label.get(f"control: {label}, fused")):
                difference = interval(gains(served.ranks) - gains(control.ranks))
                lines += [f"NDCG@10 as served to the control's, {label}: {difference}.", ""]
        if served:
            main = runs_of(dataset, retriever, "main")
            seeds = [load_kept(run.files()["tuned"])[0] for run in main if run.files()["tuned"].exists()]
            lines += ["Pools of several opinions, each with a weight of its own:", "", *pools(kept, seeds), ""]
        if served and paper:
            if dataset == "amazon-2014-beauty":
                lines += [
                    "The paper's Table 4, figures as their authors reported them:",
                    "",
                    *reported(kept, served),
                    "",
                ]
            plot_weights(dataset, PAGE.parent / f"ranker-weights-{dataset}.png")
            lines += [f"![NDCG@10 by weight](ranker-weights-{dataset}.png)", *beyond_letters(dataset), ""]
    return "\n".join(lines) or "Nothing is kept yet: run `make retrain-ranker`.\n"


def train(work: Path) -> None:
    """Executes every run whose scores are not kept, each in a process of its own that is stopped at its bound."""
    for number, run in enumerate(RUNS):
        if all(path.exists() for path in run.files().values()):
            continue
        command = [sys.executable, "-m", "benchmarks.rankers", "one", "--number", str(number), "--work", str(work)]
        print(f"{run.name}, at most {run.hours:g} h", flush=True)
        try:
            subprocess.run(command, check=True, cwd=ROOT, timeout=run.hours * 3600)
        except subprocess.TimeoutExpired:
            print(f"{run.name}: stopped at its bound; the next call goes on from its checkpoint", flush=True)


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "tables", "one"))
    parser.add_argument("--number", type=int, help="of the run, for `one`")
    parser.add_argument("--work", type=Path, default=ROOT / "artifacts" / "results", help="data, weights, checkpoints")
    given = parser.parse_args()
    if given.what == "train":
        train(given.work)
    elif given.what == "one":
        execute(RUNS[given.number], given.work)
    else:
        KEPT.mkdir(parents=True, exist_ok=True)
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        PAGE.write_text(f"{before}{BEGIN}\n\n{tables()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
