"""Writes the generated blocks and plots of docs/results/ranker.md from the kept lists and scores.

python -m experiments.ranker_tables    # make results-ranker: half a minute
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from experiments.kept import PAGES, SPLITS, RankerLists, lists_path, read_lists, read_scores
from experiments.pages import table, write_blocks
from experiments.paper import METRICS, TABLE_1, TABLE_3, TABLE_4, TABLE_4_METRICS
from experiments.ranker_runs import RUNS
from experiments.ranker_statistics import (
    ALL_SIGNALS,
    CONTROLS,
    LANGUAGE_MODEL,
    MAIN,
    Results,
    Row,
    alone_row,
    averaged,
    combined_row,
    fused_row,
    gains,
    kept_trainings,
    reciprocals,
    results_of,
    retriever_row,
)
from models.intervals import interval
from models.ranker.fusion import ndcg_by_weight

PAGE = PAGES / "ranker.md"
NOTHING = "No scores are stored yet: run `make retrain-ranker`."
COMBINATIONS = ((), ("popularity",), ("title similarity",), ("popularity", "title similarity"), (ALL_SIGNALS,))
"""Sources that are combined with the retriever, without and with the language model."""
PAPER_MODELS = {"LRURec": "lrurec", "LlamaRec, 7B": "llamarec"}
"""The paper's models that are shown below ours, by label."""


def all_results() -> list[Results]:
    """Return the results of every data set and retriever that has kept lists, in the order of the queue."""
    pairs = dict.fromkeys((run.dataset, run.retriever) for run in RUNS)
    return [results_of(*pair) for pair in pairs if lists_path(*pair, 20).exists()]


def summary_block(every: Sequence[Results]) -> str:
    """Return the page's opening table: the served list compared with the retriever's."""
    rows = []
    for results in sorted(every, key=lambda results: (results.dataset, results.retriever)):
        served = results.row(MAIN)
        if served is None:
            continue
        retriever = results.rows[0]
        before, after = (overall_metrics(results.lists, row) for row in (retriever, served))
        paper = dict(zip(METRICS, TABLE_1[results.dataset]["llamarec"], strict=True))
        rows.append(
            [
                f"{results.dataset}, {results.retriever}",
                f"{results.lists.users:,} ({len(results.lists.test.truths):,})",
                f"{before['NDCG@10']:.4f}",
                f"{after['NDCG@10']:.4f}",
                interval(gains(served.ranks) - gains(retriever.ranks)),
                f"{before['Recall@10']:.4f} → {after['Recall@10']:.4f}",
                f"{paper['NDCG@10']:.4f} / {paper['Recall@10']:.4f}" if results.retriever == "lrurec" else "",
            ]
        )
    header = (
        "data set, retriever",
        "test users (in the subset)",
        "NDCG@10, retriever",
        "NDCG@10, with the ranker",
        "difference on the subset [95 %]",
        "Recall@10, retriever → with the ranker",
        "the paper's LlamaRec, 7B: NDCG@10 / Recall@10",
    )
    return "\n".join(table(header, rows)) if rows else NOTHING


def worth_block(every: Sequence[Results]) -> str:
    """Return what each training adds to the retriever and all signals together."""
    rows = []
    sources = ["retriever", ALL_SIGNALS]
    for results in sorted(every, key=lambda results: (results.dataset, results.retriever)):
        for label, seeds in kept_trainings(results.dataset, results.retriever).items():
            without = combined_row(results.lists, seeds, sources)
            added = combined_row(results.lists, seeds, [*sources, LANGUAGE_MODEL])
            cells = [f"{results.dataset}, {results.retriever}", label, str(len(seeds))]
            cells += [f"{averaged(row.ranks)['NDCG@10']:.4f}" for row in (without, added)]
            rows.append([*cells, interval(gains(added.ranks) - gains(without.ranks))])
    header = (
        "data set, retriever",
        "training",
        "seeds",
        "NDCG@10 on the subset, retriever and signals",
        "with the language model",
        "difference [95 %]",
    )
    return "\n".join(table(header, rows)) if rows else NOTHING


def tables_block(every: Sequence[Results]) -> str:
    """Return the full tables of every data set and retriever."""
    return "\n".join(line for results in every for line in full_tables(results)) or NOTHING


def full_tables(results: Results) -> list[str]:
    """Return the Markdown lines of one data set and retriever."""
    dataset, lists, served = results.dataset, results.lists, results.row(MAIN)
    with_paper = results.retriever == "lrurec"
    lines = [
        f"## Full tables: {dataset}, {results.retriever}",
        "",
        f"The subset: {len(lists.test.truths):,} of {lists.users:,} test users, those whose true item is among the 20"
        " candidates.",
        "",
        *subset_table(results.rows, paper_rows(TABLE_3[dataset]) if with_paper else {}),
        "",
        "All test users (a user whose true item is not among the candidates counts 0):",
        "",
        *overall_table(lists, results.rows[:3], paper_rows(TABLE_1[dataset]) if with_paper else {}),
        "",
    ]
    if served is None:
        return lines
    for name in CONTROLS:
        if control := results.row(f"control: {name}, fused"):
            difference = interval(gains(served.ranks) - gains(control.ranks))
            lines += [f'NDCG@10, as served minus the control "{name}": {difference}.', ""]
    lines += ["Combinations of score sources, each source with its own fitted weight:", ""]
    lines += [*combinations_table(results), ""]
    if with_paper:
        if dataset == "amazon-2014-beauty":
            lines += ["The paper's Table 4, as reported by its authors, and our result:", ""]
            lines += [*reported_table(lists, served), ""]
        lines += [f"![NDCG@10 by the retriever's weight]({plot_path(dataset).name})", ""]
        lines += fifty_candidates(dataset)
    return lines


def paper_rows(figures: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """Return the rows of the paper's table that are shown below ours, by label."""
    return {f"*the paper's {label}*": figures[model] for label, model in PAPER_MODELS.items()}


def subset_table(rows: Sequence[Row], paper: Mapping[str, Sequence[float]]) -> list[str]:
    """Return the paper's Table 3 for these rows, each with its difference from the first."""
    differences = ("NDCG@10, difference from the retriever [95 %]", "MRR@5, difference [95 %]")
    header = ("", "seeds", *METRICS, *differences, "retriever's weight, per seed", "s per request")
    body = []
    for row in rows:
        cells = [row.label, "", *formatted(averaged(row.ranks).values()), "", "", "", ""]
        if row is not rows[0]:
            cells[1] = str(len(row.ranks))
            cells[-4] = interval(gains(row.ranks) - gains(rows[0].ranks))
            cells[-3] = interval(reciprocals(row.ranks) - reciprocals(rows[0].ranks))
            cells[-2] = ", ".join(f"{weight:.2f}" for weight in row.weights)
            cells[-1] = "" if row.seconds is None else f"{row.seconds:.2f}"
        body.append(cells)
    body += [[label, "", *formatted(figures), "", "", "", ""] for label, figures in paper.items()]
    return table(header, body)


def overall_table(lists: RankerLists, rows: Sequence[Row], paper: Mapping[str, Sequence[float]]) -> list[str]:
    """Return the paper's Table 1 for these rows."""
    body = [[row.label, *formatted(overall_metrics(lists, row).values())] for row in rows]
    body += [[label, *formatted(figures)] for label, figures in paper.items()]
    return table(("", *METRICS), body)


def reported_table(lists: RankerLists, row: Row) -> list[str]:
    """Return the paper's Table 4 with a row of ours."""
    figures = overall_metrics(lists, row)
    body = [[f"{name} (reported)", *reported] for name, reported in TABLE_4.items()]
    body.append([f"ours, {row.label}", *formatted(figures[name] for name in TABLE_4_METRICS)])
    return table(("", *TABLE_4_METRICS), body)


def combinations_table(results: Results) -> list[str]:
    """Return what combinations of score sources reach, and the gain from adding the language model to each."""
    alone = gains(results.rows[0].ranks)
    body = []
    for others in COMBINATIONS:
        row = combined_row(results.lists, results.seeds, ["retriever", *others])
        without = gains(row.ranks)
        added = gains(combined_row(results.lists, results.seeds, ["retriever", *others, LANGUAGE_MODEL]).ranks)
        difference = interval(without - alone) if others else ""
        body.append([row.label, difference, interval(added - alone), interval(added - without)])
    header = (
        "score sources",
        "NDCG@10, difference from the retriever",
        "the same with the language model added",
        "gain from the language model",
    )
    return table(header, body)


def fifty_candidates(dataset: str) -> list[str]:
    """Return the table of the main ranker with 50 candidates, if it was run."""
    run = next(run for run in RUNS if (run.dataset, run.variant) == (dataset, "fifty-candidates"))
    path = run.files()["tuned"]
    if not path.exists():
        return []
    lists, scores = read_lists(lists_path(dataset, run.retriever, 50)), read_scores(path)
    seeds, seconds = [scores.by_split()], scores.facts["seconds_a_request"]
    rows = [
        retriever_row(lists),
        alone_row("main: alone", lists, seeds, seconds),
        fused_row(MAIN, lists, seeds, seconds),
    ]
    users = f"{len(lists.test.truths):,} users whose true item is among them"
    return [f"The same ranker with 50 candidates ({users}):", "", *subset_table(rows, {}), ""]


def overall_metrics(lists: RankerLists, row: Row) -> dict[str, float]:
    """Return the metrics over all test users; a user whose true item is not among the candidates counts 0."""
    share = len(lists.test.truths) / lists.users
    return {name: value * share for name, value in averaged(row.ranks).items()}


def formatted(figures: Iterable[float]) -> list[str]:
    """Return the figures with four decimals."""
    return [f"{figure:.4f}" for figure in figures]


def plot_path(dataset: str) -> Path:
    """Return where the plot of a data set is written."""
    return PAGE.with_name(f"ranker-weights-{dataset}.png")


def plot_weights(results: Results) -> None:
    """Plot NDCG@10 of the first seed against the retriever's weight, on validation and test users."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    for name in SPLITS:
        part = results.lists.part(name)
        by_weight = ndcg_by_weight(results.seeds[0][name], part.scores, part.truths)
        axes.plot(list(by_weight), list(by_weight.values()), marker="o", markersize=3, label=name)
    axes.set(xlabel="weight of the retriever (1: retriever alone)", ylabel="NDCG@10", title=results.dataset)
    axes.legend()
    figure.savefig(plot_path(results.dataset), dpi=120, metadata={"Software": None})


def main() -> None:
    """Parse the command line and write the page."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    every = all_results()
    blocks = {"summary": summary_block(every), "worth": worth_block(every), "tables": tables_block(every)}
    write_blocks(PAGE, blocks)
    for results in every:
        if results.retriever == "lrurec" and results.seeds:
            plot_weights(results)


if __name__ == "__main__":
    main()
