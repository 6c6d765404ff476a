"""Compares two ways to choose the retriever's weight: by the best NDCG@10, and by the likelihood of the true items.

    python -m experiments.fusion_weights

Only validation users take part: the weight is chosen on a random part of them and evaluated on the rest, many times,
with the kept scores of the rankers (docs/results/data/ranker). The command prints a Markdown table.
"""

import argparse

import numpy as np
from numpy.typing import NDArray

from experiments.kept import lists_path, read_lists, read_scores
from experiments.pages import table, table_row
from experiments.ranker_runs import RUNS, Run
from experiments.ranker_statistics import gains
from models.ranker.fitting.fusion_fit import fit_fusion
from models.ranker.fusion import WEIGHTS, fuse, true_places

SHARES = (0.1, 0.25, 0.5)
"""Shares of the validation users on whom the weight is chosen."""
REPEATS = 200


def evaluate(run: Run, way: str, share: float) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """Return NDCG@10 minus the retriever's, on the users who did not choose the weight.

    Args:
        run: whose scores are fused.
        way: see :class:`Run`.
        share: share of the users who choose.

    Returns:
        the differences [repeats] if the weight is chosen by NDCG@10, those if by likelihood, and the number of users
        who choose.
    """
    kept = read_lists(lists_path(run.dataset, run.retriever, 20)).validation
    model, scores = np.stack(read_scores(run.files()[way]).by_split()["validation"]), np.stack(kept.scores)
    truths = np.array(kept.truths)
    count = round(share * len(truths))
    at = np.stack([gains([true_places(fuse(model, scores, w), kept.truths)]) for w in WEIGHTS])  # [weights, users]
    rng = np.random.default_rng(0)
    by_ndcg, by_likelihood = np.empty(REPEATS), np.empty(REPEATS)
    for repeat in range(REPEATS):
        choosing, rest = np.split(rng.permutation(len(truths)), [count])
        retriever = at[-1, rest].mean()
        by_ndcg[repeat] = at[at[:, choosing].mean(axis=1).argmax(), rest].mean() - retriever
        weight, _ = fit_fusion(list(model[choosing]), list(scores[choosing]), truths[choosing].tolist())
        ranks = true_places(fuse(model[rest], scores[rest], weight), truths[rest].tolist())
        by_likelihood[repeat] = gains([ranks]).mean() - retriever
    return by_ndcg, by_likelihood, count


def main() -> None:
    """Print a row for each main ranker of the first seed, way and share."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    header = ("data set, retriever", "ranker", "users for choosing", "by the best NDCG@10", "by likelihood")
    print("\n".join(table(header, [])))
    for run in RUNS:
        if run.variant != "main" or run.seed != 42:
            continue
        for way in ("tuned", "permuted", "untuned"):
            if way not in run.ways or not run.files()[way].exists():
                continue
            for share in SHARES:
                *gained, users = evaluate(run, way, share)
                cells = [f"{each.mean():+.4f} ± {each.std():.4f}" for each in gained]
                print(table_row([f"{run.dataset}, {run.retriever}", way, str(users), *cells]), flush=True)


if __name__ == "__main__":
    main()
