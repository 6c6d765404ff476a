"""How well the retriever's weight is chosen: by the best NDCG@10 of some users, or by what explains their items best.

    python -m benchmarks.fusion_weights

Only validation users take part: the weight is chosen on a random part of them and judged on the rest, many times, for
what is kept of the rankers (docs/results/data/ranker).
"""

import numpy as np
from numpy.typing import NDArray

from benchmarks.ranker_runs import RUNS, Run, lists_path
from benchmarks.rankers import gains, load_kept, load_lists
from models.ranker.fitting.fusion_fit import fit_fusion
from models.ranker.fusion import WEIGHTS, fuse, true_places

SHARES = (0.1, 0.25, 0.5)
"""Of the validation users, on whom the weight is chosen."""
REPEATS = 200


def judged(run: Run, way: str, share: float) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """NDCG@10 over the retriever's, on users that chose nothing: by NDCG and by likelihood [repeats], and how many
    users chose.
    """
    kept = load_lists(lists_path(run.dataset, run.retriever, 20)).validation
    model, scores = np.stack(load_kept(run.files()[way])[0]["validation"]), np.stack(kept.scores)
    truths = np.array(kept.truths)
    count = round(share * len(truths))
    at = np.stack([gains([true_places(fuse(model, scores, weight), truths)]) for weight in WEIGHTS])  # [weights, users]
    rng = np.random.default_rng(0)
    by_ndcg, by_likelihood = np.empty(REPEATS), np.empty(REPEATS)
    for repeat in range(REPEATS):
        choosing, rest = np.split(rng.permutation(len(truths)), [count])
        retrievers = at[-1, rest].mean()
        by_ndcg[repeat] = at[at[:, choosing].mean(axis=1).argmax(), rest].mean() - retrievers
        weight, _ = fit_fusion(model[choosing], scores[choosing], truths[choosing])
        ranks = true_places(fuse(model[rest], scores[rest], weight), truths[rest])
        by_likelihood[repeat] = gains([ranks]).mean() - retrievers
    return by_ndcg, by_likelihood, count


def main() -> None:
    """Prints a Markdown table."""
    print("| data set, retriever | ranker | users | by the best NDCG@10 | by likelihood |")
    print("|---|---|---|---|---|")
    for run in RUNS:
        if run.variant != "main" or run.seed != 42:
            continue
        for way in ("tuned", "permuted", "untuned"):
            if way not in run.ways or not run.files()[way].exists():
                continue
            for share in SHARES:
                *gained, users = judged(run, way, share)
                cells = [f"{each.mean():+.4f} ± {each.std():.4f}" for each in gained]
                print(f"| {run.dataset}, {run.retriever} | {way} | {users} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
