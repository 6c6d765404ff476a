"""The tables of the retrieval stage for docs/results/retrievers.md, from the kept ranks."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.kept import (
    LADDERS,
    RETRIEVERS,
    choose,
    ladder_path,
    read_ladder,
    read_retriever_runs,
    read_untrained,
)
from experiments.pages import table
from experiments.paper import METRICS, TABLE_1
from experiments.retrieval_ladder import SEEDS
from models.intervals import interval
from models.metrics import gains, recall, summary

CUTOFFS = (20, 50, 200)
STEPS: Mapping[str, Sequence[tuple[str, str]]] = {
    "ml-latest-small": (
        ("plain", "LRURec"),
        ("plain + signals", "+ signals"),
        ("plain, titles + signals", "+ LRURec with titles as the second retriever"),
    ),
    "amazon-2014-beauty": (
        ("plain", "LRURec"),
        ("titles", "+ titles"),
        ("titles + signals", "+ signals"),
        ("titles, second + signals", "+ SASRec with titles as the second retriever"),
    ),
}
"""The ladder of each data set: the kept rung and what the table calls it."""
DEFAULT = {"ml-latest-small": "plain + signals", "amazon-2014-beauty": "titles + signals"}
"""The rung whose signals are left out one by one."""
ANCHORS = {
    "amazon-2014-beauty": (("*SASRec with full cross-entropy, best verified elsewhere*", 0.0986, 0.0597),),
}
"""Published Recall@10 and NDCG@10, beside the paper's."""
UNTRAINED_TOO = ", untrained items too"
"""How the names of ways end in which untrained items take part."""

Ranks = list[NDArray[np.signedinteger[Any]]]
"""Test ranks [users] of each seed."""


def read_rungs(dataset: str) -> dict[str, Ranks]:
    """Return the test ranks of every rung of a data set, for each seed that is kept."""
    rungs: dict[str, Ranks] = {}
    for seed in SEEDS:
        if ladder_path(dataset, seed).exists():
            for name, rung in read_ladder(ladder_path(dataset, seed)).items():
                rungs.setdefault(name, []).append(rung["test"])
    if rungs and "plain" not in rungs:
        runs = [run for run in read_retriever_runs(RETRIEVERS) if run.dataset == dataset]
        rungs["plain"] = [run.test for run in choose(runs)["lrurec"]]
    return rungs


def metrics_of(ranks: Ranks) -> dict[str, float]:
    """Return the six metrics of the paper and the longer recalls, averaged over the seeds."""
    rows = [{**summary(some), **{f"Recall@{k}": recall(some, k) for k in CUTOFFS}} for some in ranks]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def difference(before: Ranks, after: Ranks) -> str:
    """Return the difference of NDCG@10 and its interval over users, each user averaged over the seeds of both."""
    seeds = min(len(before), len(after))
    means = [np.mean([gains(ranks, 10) for ranks in some[:seeds]], axis=0) for some in (before, after)]
    return interval(means[1] - means[0])


def summary_rows(dataset: str) -> list[list[str]]:
    """Return the rows of README's table: Recall@10 / NDCG@10 of each step, and the published figures."""
    rungs = read_rungs(dataset)
    rows = []
    for name, label in STEPS[dataset]:
        if name in rungs:
            found = metrics_of(rungs[name])
            rows.append([label, f"{found['Recall@10']:.4f} / {found['NDCG@10']:.4f}"])
    return rows


def ladder_block(dataset: str) -> list[str]:
    """Return the Markdown lines of one data set; none if no ranks are kept."""
    rungs = read_rungs(dataset)
    if not rungs:
        return []
    names = (*METRICS, *(f"Recall@{k}" for k in CUTOFFS))
    rows, before = [], None
    for name, label in STEPS[dataset]:
        if name in rungs:
            ranks = rungs[name]
            gained = "" if before is None else difference(before, ranks)
            rows.append([label, str(len(ranks)), *_figures(ranks, names), gained])
            before = ranks
    paper = {"*LRURec, the paper's*": "lrurec", "*LlamaRec 7B, the paper's*": "llamarec"}
    for label, model in paper.items():
        figures = [f"{figure:.4f}" for figure in TABLE_1[dataset][model]]
        rows.append([label, "", *figures, *[""] * (len(CUTOFFS) + 1)])
    for label, reached, gain in ANCHORS.get(dataset, ()):
        cells = dict.fromkeys(names, "") | {"Recall@10": f"{reached:.4f}", "NDCG@10": f"{gain:.4f}"}
        rows.append([label, "", *cells.values(), ""])
    lines = [f"### {dataset}", "", *table(("", "seeds", *names, "NDCG@10, gained by this step"), rows), ""]
    return lines + others_block(dataset, rungs) + control_block(dataset) + untrained_block(dataset)


def others_block(dataset: str, rungs: Mapping[str, Ranks]) -> list[str]:
    """Return the table of single signals and of the signals left out one by one."""
    whole = rungs.get(DEFAULT[dataset])
    if whole is None:
        return []
    steps = {name for name, _ in STEPS[dataset]}
    rows = []
    for name, ranks in rungs.items():
        if name not in steps:
            found = metrics_of(ranks)
            figures = [f"{found[key]:.4f}" for key in ("Recall@10", "NDCG@10")]
            rows.append([name, str(len(ranks)), *figures, difference(whole, ranks)])
    header = ("", "seeds", "Recall@10", "NDCG@10", f'NDCG@10 compared with "{DEFAULT[dataset]}"')
    return ["Other combinations, and the signals left out one by one:", "", *table(header, rows), ""]


def control_block(dataset: str) -> list[str]:
    """Return the table of the control with equal times in random order."""
    rows = []
    for seed in SEEDS:
        path = ladder_path(f"{dataset}-random-ties", seed)
        if not path.exists():
            continue
        kept = read_ladder(path)
        before: Ranks | None = None
        for name, label in STEPS[dataset]:
            if name in kept:
                ranks = [kept[name]["test"]]
                gained = "" if before is None else difference(before, ranks)
                shown = f"LRURec {label}" if before is None and label.startswith("+") else label
                rows.append([shown, str(seed), *_figures(ranks, ("Recall@10", "NDCG@10")), gained])
                before = ranks
        alone = [kept["transitions alone"]["test"]]
        rows.append(["transitions alone", str(seed), *_figures(alone, ("Recall@10", "NDCG@10")), ""])
    if not rows:
        return []
    head = "The control: interactions of equal time in random order instead of by item id, everything trained again."
    return [head, "", *table(("", "seed", "Recall@10", "NDCG@10", "NDCG@10, gained by this step"), rows), ""]


def untrained_block(dataset: str) -> list[str]:
    """Return the table of items that were taken out of training."""
    path = LADDERS / f"{dataset}-untrained.parquet"
    if not path.exists():
        return []
    new, ways = read_untrained(path)
    rows = []
    for way, ranks in ways.items():
        cells: list[Any] = [f"{recall(ranks[some], k):.4f}" for some in (new, ~new) for k in (10, 20)]
        without = ways.get(way.removesuffix(UNTRAINED_TOO), ranks)
        change = "" if without is ranks else interval(found_in(ranks[~new], 10) - found_in(without[~new], 10))
        rows.append([way, *cells, change])
    head = (
        f"A tenth of the items taken out of training: {int(new.sum()):,} users whose next item is one of them (new),"
        f" and {int((~new).sum()):,} others (known). One seed."
    )
    change = "known, Recall@10, changed by the untrained items"
    header = ("", "new, Recall@10", "new, Recall@20", "known, Recall@10", "known, Recall@20", change)
    return [head, "", *table(header, rows), ""]


def found_in(ranks: NDArray[np.signedinteger[Any]], k: int) -> NDArray[np.float64]:
    """Return 1 for each rank among the first ``k``, and 0 for the others."""
    return ((ranks > 0) & (ranks <= k)).astype(np.float64)


def _figures(ranks: Ranks, names: Sequence[str]) -> list[str]:
    found = metrics_of(ranks)
    return [f"{found[name]:.4f}" for name in names]
