"""Writes the generated blocks and plots of docs/results/retrievers.md from the kept ranks.

    python -m experiments.retriever_tables    # make results-retrievers: seconds

Settings are chosen by validation Recall@10; the tables report the test split of what was chosen.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.kept import PAGES, RETRIEVERS, RetrieverRun, choose, read_retriever_runs
from experiments.ladder_tables import ladder_block
from experiments.pages import table, write_blocks
from experiments.paper import METRICS, TABLE_1, TABLE_3
from models.metrics import summary
from models.retriever.batches import Items

PAGE = PAGES / "retrievers.md"
LABELS = {
    "bert4rec": "BERT4Rec",
    "lrurec": "LRURec",
    "lrurec, sampled softmax": "LRURec, softmax over a sample",
    "narm": "NARM",
    "sasrec, binary loss": "SASRec, binary loss",
    "sasrec": "SASRec, full cross-entropy",
    "bert4rec, titles": "BERT4Rec with titles",
    "lrurec, titles": "LRURec with titles",
    "narm, titles": "NARM with titles",
    "sasrec, titles": "SASRec, full cross-entropy, with titles",
}
"""How the models are shown, by :attr:`RetrieverRun.model`."""
OPTIONS = ("dropout", "weight_decay", "learning_rate", "batch_size", "max_length", "patience", "seed")
"""Options that the table of all runs shows."""


def mean_metrics(ranks: Sequence[Items]) -> dict[str, float]:
    """Return each metric's mean over the seeds.

    Args:
        ranks: for each seed the ranks [users].
    """
    rows = [summary(some) for some in ranks]
    return {name: float(np.mean([row[name] for row in rows])) for name in METRICS}


def standard_error(ranks: Sequence[Items]) -> float:
    """Return the standard error of Recall@10 over users, from each user's mean over the seeds."""
    hits = np.mean([(some >= 1) & (some <= 10) for some in ranks], axis=0)  # [users]
    return float(hits.std(ddof=1) / np.sqrt(len(hits)))


def by_dataset(runs: Sequence[RetrieverRun]) -> dict[str, list[RetrieverRun]]:
    """Return the runs of each data set that has any, in the order of the paper."""
    found = {dataset: [run for run in runs if run.dataset == dataset] for dataset in TABLE_1}
    return {dataset: some for dataset, some in found.items() if some}


def ladder() -> str:
    """Return the tables of the retrieval stage, step by step, of every data set."""
    return "\n".join(line for dataset in TABLE_1 for line in ladder_block(dataset))


def summary_block(runs: Sequence[RetrieverRun]) -> str:
    """Return the page's opening table: the chosen setting of every model, and the paper's figures."""
    rows = []
    for dataset, some in by_dataset(runs).items():
        for model, found in choose(some).items():
            ours = mean_metrics([run.test for run in found])
            paper = dict(zip(METRICS, paper_row(TABLE_1[dataset], model), strict=True))
            figures = [f"{ours[name]:.4f} / {paper[name]:.4f}" for name in ("Recall@10", "NDCG@10")]
            rows.append([dataset, LABELS[model], str(len(found)), *figures])
    header = ("data set", "model", "seeds", "Recall@10, ours / the paper's", "NDCG@10, ours / the paper's")
    return "\n".join(table(header, rows))


def tables_block(runs: Sequence[RetrieverRun]) -> str:
    """Return the full tables of every data set."""
    return "\n".join(line for dataset, some in by_dataset(runs).items() for line in full_tables(dataset, some))


def full_tables(dataset: str, runs: Sequence[RetrieverRun]) -> list[str]:
    """Return the Markdown lines of one data set: the paper's tables 1 and 3, and all runs."""
    chosen = choose(runs)
    lines = [f"## {dataset}", "", f"![{dataset}]({plot_path(dataset).name})", ""]
    lines += ["All users, ours / the paper's Table 1. ± is the standard error of Recall@10 over users.", ""]
    lines += comparison(TABLE_1[dataset], {name: [run.test for run in found] for name, found in chosen.items()})
    if "lrurec" in chosen:
        inside = (chosen["lrurec"][0].test >= 1) & (chosen["lrurec"][0].test <= 20)
        users = f"{int(inside.sum()):,} users ({inside.mean():.4f} of all)"
        described = f"The {users} whose true item is in LRURec's top 20; first seed only; ours / the paper's Table 3."
        lines += ["", described, ""]
        lines += comparison(TABLE_3[dataset], {name: [found[0].test[inside]] for name, found in chosen.items()})
        windowed = mean_metrics([run.last_window for run in chosen["lrurec"]])
        figures = ", ".join(f"{name} {value:.4f}" for name, value in windowed.items())
        lines += ["", f"LRURec when only the last window is masked, as in its authors' code: {figures}.", ""]
    lines += ["All runs and the validation score that chose between them:", "", *all_runs_table(runs, chosen), ""]
    return lines


def comparison(paper: Mapping[str, Sequence[float]], ranks: Mapping[str, Sequence[Items]]) -> list[str]:
    """Return a table of the models' metrics, ours and the paper's.

    Args:
        paper: the paper's figures by model.
        ranks: for each of our models the ranks [users] of each seed.
    """
    rows = []
    for model, seeds in ranks.items():
        pairs = zip(mean_metrics(seeds).values(), paper_row(paper, model), strict=True)
        figures = [f"{ours:.4f} / {theirs:.4f}" for ours, theirs in pairs]
        rows.append([LABELS[model], str(len(seeds)), *figures, f"{standard_error(seeds):.4f}"])
    return table(("model", "seeds", *METRICS, "±"), rows)


def paper_row(paper: Mapping[str, Sequence[float]], model: str) -> Sequence[float]:
    """Return the paper's figures for a model; the paper has one SASRec, whichever the loss."""
    return paper[model.split(",", maxsplit=1)[0]]


def all_runs_table(runs: Sequence[RetrieverRun], chosen: Mapping[str, Sequence[RetrieverRun]]) -> list[str]:
    """Return a table of the settings and the validation score of every run."""
    rows = []
    for run in sorted(
        runs, key=lambda run: (run.model, run.options["titles"], run.options["seed"], run.options["dropout"])
    ):
        ended = ["", ""] if run.pruned else [str(run.facts["best_step"]), f"{run.facts['seconds'] / 60:.0f}"]
        rows.append(
            [
                LABELS[run.model],
                run.options["titles"],
                f"{run.options['masked_share']:g}" if run.options["model"] == "bert4rec" else "",
                *(f"{run.options[name]:g}" for name in OPTIONS),
                str(run.facts["steps"]),
                *ended,
                f"{max(point[2] for point in run.facts['curve']):.4f}",
                "pruned" if run.pruned else "chosen" if run in chosen[run.model] else "",
            ]
        )
    results = ("steps", "best step", "minutes", "validation Recall@10", "status")
    return table(("model", "titles", "masked share", *OPTIONS, *results), rows)


def plot_path(dataset: str) -> Path:
    """Return where the plot of a data set is written."""
    return PAGE.with_name(f"retrievers-{dataset}.png")


def plot(dataset: str, runs: Sequence[RetrieverRun], path: Path) -> None:
    """Plot the validation curves of the chosen runs of one data set, and their test Recall@10 with the paper's."""
    chosen = choose(runs)
    figure = Figure(figsize=(10, 4), layout="constrained")
    curves, bars = figure.subplots(1, 2)
    for place, (model, found) in enumerate(chosen.items()):
        steps, _, reached = zip(*found[0].facts["curve"], strict=True)
        curves.plot(steps, reached, label=LABELS[model], color=f"C{place}")
        ours = mean_metrics([run.test for run in found])["Recall@10"]
        error = 2 * standard_error([run.test for run in found])
        bars.bar(place - 0.2, ours, 0.4, color=f"C{place}", yerr=error, capsize=3)
        bars.bar(place + 0.2, paper_row(TABLE_1[dataset], model)[-1], 0.4, color=f"C{place}", alpha=0.35)
    curves.set(xlabel="step", ylabel="validation Recall@10", ylim=(0, None))
    curves.legend(loc="lower right")
    bars.set(ylabel="test Recall@10", xticks=range(len(chosen)), ylim=(0, None))
    bars.set_title("ours with 2 standard errors; pale: the paper's", fontsize="medium")
    bars.set_xticklabels([LABELS[model].replace(" ", "\n") for model in chosen])
    figure.suptitle(dataset)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Parse the command line and write the page."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    runs = read_retriever_runs(RETRIEVERS)
    write_blocks(PAGE, {"ladder": ladder(), "summary": summary_block(runs), "tables": tables_block(runs)})
    for dataset, some in by_dataset(runs).items():
        plot(dataset, some, plot_path(dataset))


if __name__ == "__main__":
    main()
