"""The page on retrievers from the kept ranks: tables beside the paper's, and a picture for each data set."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from models.metrics import recall, summary
from models.retriever.options import RetrieverTraining

BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
METRICS = ("MRR@5", "NDCG@5", "Recall@5", "MRR@10", "NDCG@10", "Recall@10")
PAPER = {
    "ml-latest-small": {
        "lrurec": (0.0390, 0.0468, 0.0705, 0.0491, 0.0705, 0.1426),
        "sasrec": (0.0333, 0.0409, 0.0641, 0.0378, 0.0522, 0.0993),
        "bert4rec": (0.0188, 0.0232, 0.0368, 0.0244, 0.0366, 0.0785),
        "narm": (0.0298, 0.0359, 0.0544, 0.0332, 0.0441, 0.0801),
    },
    "amazon-2014-beauty": {
        "lrurec": (0.0376, 0.0435, 0.0614, 0.0417, 0.0533, 0.0916),
        "sasrec": (0.0336, 0.0397, 0.0582, 0.0371, 0.0481, 0.0844),
        "bert4rec": (0.0246, 0.0298, 0.0457, 0.0276, 0.0372, 0.0686),
        "narm": (0.0289, 0.0342, 0.0503, 0.0321, 0.0420, 0.0746),
    },
}
"""The paper's Table 1."""
PAPER_SUBSET = {
    "ml-latest-small": {
        "lrurec": (0.1965, 0.2356, 0.3544, 0.2384, 0.3367, 0.6654),
        "sasrec": (0.1449, 0.1793, 0.2833, 0.1596, 0.2147, 0.3927),
        "bert4rec": (0.0887, 0.1032, 0.1477, 0.1054, 0.1435, 0.2720),
        "narm": (0.1369, 0.1607, 0.2329, 0.1485, 0.1886, 0.3188),
    },
    "amazon-2014-beauty": {
        "lrurec": (0.2944, 0.3403, 0.4801, 0.3259, 0.4168, 0.7170),
        "sasrec": (0.2296, 0.2679, 0.3843, 0.2491, 0.3152, 0.5312),
        "bert4rec": (0.1587, 0.1901, 0.2861, 0.1743, 0.2281, 0.4043),
        "narm": (0.1961, 0.2284, 0.3263, 0.2128, 0.2689, 0.4517),
    },
}
"""The paper's Table 3."""


@dataclass(frozen=True)
class Run:
    """A finished training and the ranks it gave every user; none when it was pruned."""

    dataset: str
    options: dict[str, Any]
    facts: dict[str, Any]
    """``steps, best_step, seconds, curve``, and whether it was ``pruned``."""
    validation: np.ndarray
    test: np.ndarray
    last_window: np.ndarray
    """Test ranks when only the items that the model reads are masked, as the authors do."""

    @property
    def model(self) -> str:
        """The architecture, with its loss where it has a choice."""
        return "sasrec, binary loss" if self.options["loss"] == "binary" else str(self.options["model"])

    def reached_by(self, step: int) -> float:
        """Best validation Recall@10 up to a step."""
        return max(reached for at, _, reached in self.facts["curve"] if at <= step)

    @property
    def pruned(self) -> bool:
        """Whether it was given up."""
        return bool(self.facts.get("pruned"))

    def settings(self) -> str:
        """Everything but the seed, to find the runs of one setting."""
        return json.dumps({name: value for name, value in self.options.items() if name != "seed"}, sort_keys=True)


def load_runs(folder: Path) -> list[Run]:
    """Every kept run; one from before an option existed had its default."""
    runs = []
    for path in sorted(folder.glob("*.parquet")):
        table = pq.read_table(path)
        said = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
        kinds = ("validation", "test", "last_window")
        ranks = (table[kind].to_numpy() if kind in table.column_names else np.empty(0, np.int32) for kind in kinds)
        options = asdict(RetrieverTraining(**json.loads(said["options"])))
        runs.append(Run(said["dataset"], options, json.loads(said["facts"]), *ranks))
    return runs


def choose(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """For each model of one data set the runs of the setting that validation chose, one for each seed.

    A setting is judged by its run with the first seed, so that one with more seeds has no more chances.
    """
    chosen = {}
    by_model: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if not run.pruned:
            by_model[run.model].append(run)
    for model, found in by_model.items():
        first = min(run.options["seed"] for run in found)
        best = max((run for run in found if run.options["seed"] == first), key=lambda run: recall(run.validation, 10))
        chosen[model] = [run for run in found if run.settings() == best.settings()]
    return chosen


def mean_metrics(ranks: Sequence[np.ndarray]) -> dict[str, float]:
    """Each metric's mean over the seeds."""
    rows = [summary(some) for some in ranks]
    return {name: float(np.mean([row[name] for row in rows])) for name in METRICS}


def standard_error(ranks: Sequence[np.ndarray]) -> float:
    """Of Recall@10 over the users, from each user's mean over the seeds."""
    hits = np.mean([(some >= 1) & (some <= 10) for some in ranks], axis=0)  # [users]
    return float(hits.std(ddof=1) / np.sqrt(len(hits)))


def tables(runs: Sequence[Run]) -> str:
    """Markdown: what validation chose beside the paper's tables 1 and 3, and every run that it chose among."""
    lines: list[str] = []
    for dataset, paper in PAPER.items():
        of_data = [run for run in runs if run.dataset == dataset]
        if not of_data:
            continue
        chosen = choose(of_data)
        lines += [f"## {dataset}", "", f"![{dataset}](retrievers-{dataset}.png)", ""]
        lines += ["All users: ours / the paper's Table 1. The error is Recall@10's over users.", ""]
        lines += _beside_paper(paper, {name: [run.test for run in found] for name, found in chosen.items()})
        if "lrurec" in chosen:
            lines += _subset(chosen, dataset)
            windowed = mean_metrics([run.last_window for run in chosen["lrurec"]])
            figures = ", ".join(f"{name} {value:.4f}" for name, value in windowed.items())
            lines += ["", f"LRURec with only the last window masked, as its authors do: {figures}.", ""]
        lines += _every_run(of_data, chosen)
    return "\n".join(lines)


def _beside_paper(paper: dict[str, tuple[float, ...]], ranks: dict[str, list[np.ndarray]]) -> list[str]:
    lines = [f"| model | seeds | {' | '.join(METRICS)} | ± |", "|---" * (len(METRICS) + 3) + "|"]
    for name, some in ranks.items():
        ours, theirs = mean_metrics(some), paper[name.split(",")[0]]
        cells = [f"{value:.4f} / {other:.4f}" for value, other in zip(ours.values(), theirs, strict=True)]
        lines.append(f"| {name} | {len(some)} | {' | '.join(cells)} | {standard_error(some):.4f} |")
    return lines


def _subset(chosen: dict[str, list[Run]], dataset: str) -> list[str]:
    """The users whose item LRURec has in its top 20, for the first seed of every model."""
    inside = (chosen["lrurec"][0].test >= 1) & (chosen["lrurec"][0].test <= 20)
    users = f"{int(inside.sum()):,} users ({inside.mean():.4f} of all)"
    ranks = {name: [found[0].test[inside]] for name, found in chosen.items()}
    lines = ["", f"The {users} whose item is among LRURec's top 20, first seeds: ours / the paper's Table 3.", ""]
    return lines + _beside_paper(PAPER_SUBSET[dataset], ranks)


def _every_run(runs: Sequence[Run], chosen: dict[str, list[Run]]) -> list[str]:
    columns = ("dropout", "weight_decay", "learning_rate", "batch_size", "max_length", "patience", "seed")
    lines = [
        "Every run, and what was chosen by:",
        "",
        f"| model | masked | {' | '.join(columns)} | steps | best step | minutes | validation Recall@10 | |",
    ]
    lines += ["|---" * (len(columns) + 7) + "|"]
    for run in sorted(runs, key=lambda run: (run.model, run.options["seed"], run.options["dropout"])):
        masked = f"{run.options['masked_share']:g}" if run.model == "bert4rec" else ""
        settings = " | ".join([masked, *(f"{run.options[column]:g}" for column in columns)])
        reached = max(point[2] for point in run.facts["curve"])
        mark = "pruned" if run.pruned else "chosen" if run in chosen[run.model] else ""
        ended = " | " if run.pruned else f"{run.facts['best_step']} | {run.facts['seconds'] / 60:.0f}"
        facts = f"{run.facts['steps']} | {ended}"
        lines.append(f"| {run.model} | {settings} | {facts} | {reached:.4f} | {mark} |")
    return [*lines, ""]


def plot(runs: Sequence[Run], path: Path) -> None:
    """Validation curves of what was chosen for one data set, and its test Recall@10 beside the paper's."""
    chosen = choose(runs)
    paper = PAPER[runs[0].dataset]
    figure = Figure(figsize=(10, 4), layout="constrained")
    curves, bars = figure.subplots(1, 2)
    for place, (name, found) in enumerate(chosen.items()):
        steps, _, reached = zip(*found[0].facts["curve"], strict=True)
        curves.plot(steps, reached, label=name, color=f"C{place}")
        ours = mean_metrics([run.test for run in found])["Recall@10"]
        error = 2 * standard_error([run.test for run in found])
        bars.bar(place - 0.2, ours, 0.4, color=f"C{place}", yerr=error, capsize=3)
        bars.bar(place + 0.2, paper[name.split(",")[0]][-1], 0.4, color=f"C{place}", alpha=0.35)
    curves.set(xlabel="step", ylabel="validation Recall@10", ylim=(0, None))
    curves.legend(loc="lower right")
    bars.set(ylabel="test Recall@10", xticks=range(len(chosen)), ylim=(0, None))
    bars.set_title("ours with 2 standard errors; pale: the paper's", fontsize="medium")
    bars.set_xticklabels([name.replace(", ", ",\n") for name in chosen])
    figure.suptitle(runs[0].dataset)
    figure.savefig(path, dpi=120)


def write_page(page: Path, runs: Sequence[Run]) -> None:
    """Replaces the tables of the page and the pictures beside it."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n{tables(runs)}\n{END}{after}", encoding="utf-8")
    for dataset in PAPER:
        if of_data := [run for run in runs if run.dataset == dataset]:
            plot(of_data, page.with_name(f"retrievers-{dataset}.png"))
