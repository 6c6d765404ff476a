"""`llamarec evaluate`."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llamarec.options import DEFAULT_ARTIFACTS, DEFAULT_REPOSITORY, Artifacts, Json, Repository, addresses
from llamarec.tables import console, print_gain, print_json, print_table

if TYPE_CHECKING:  # evaluation imports torch: not for `--help`
    from serving.evaluation import Ask, ServedList

IN_FLIGHT = 4
"""Concurrent requests: enough that the server's steps overlap."""
TIMEOUT_S = 300.0
"""Deadline of one answer, which waits for those that are ranked before it."""


def evaluate(
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    repository: Repository = DEFAULT_REPOSITORY,
    served: Annotated[
        str | None,
        typer.Option(
            help="HOST:PORT of a running server, or of several, separated by commas; every test user's list is asked"
            " for, and the answers compared."
        ),
    ] = None,
    oracle_users: Annotated[
        int, typer.Option(help="Number of users to compare with fp32 PyTorch as well, with --served.")
    ] = 50,
    as_json: Json = False,
) -> None:
    """Print the paper's tables 1 and 3 for the exported models. With --served, compare a running server's answers."""
    from serving.evaluation import evaluate as run

    result = run(artifacts, repository, ask_server(served) if served else None, oracle_users)
    print_json(result) if as_json else print_evaluation(result)


def ask_server(servers: str) -> "Ask":
    """Return a function that asks servers, separated by commas, for the ranked list of each history, in order."""
    from llamarec_client import RecommenderClient
    from serving.evaluation import ServedList

    def ask(histories: Sequence[Sequence[str]]) -> "Iterable[ServedList]":
        with RecommenderClient(addresses(servers)) as client, ThreadPoolExecutor(IN_FLIGHT) as pool:
            for answer in pool.map(lambda history: client.recommend(history, timeout=TIMEOUT_S), histories):
                yield ServedList([r.item_id for r in answer], [r.score for r in answer])

    return ask


def print_evaluation(result: Mapping[str, Any]) -> None:
    """Print the paper's tables 1 and 3, and the comparison with a running server."""
    names = {
        "retriever": "retriever alone",
        "ranker_alone": "+ ranker alone, without the retriever's scores",
        "ranker": f"+ ranker as served (retriever's weight {result['fusion_weight']:g})",
    }
    columns = list(result["retriever"]["overall"])
    for part, title in (
        ("overall", f"{result['dataset']}: all {result['users']:,} test users (the paper's Table 1)"),
        ("subset", f"{result['subset_users']:,} users whose true item is among the top 20 (the paper's Table 3)"),
    ):
        rows = [[label, *result[name][part].values()] for name, label in names.items()]
        print_table(title, ["", *columns], rows)
    if gain := result.get("gain"):
        print_gain(gain, f"all {result['users']:,} test users")
    if served := result.get("served"):
        compared = f"; {served['equal_to_oracle']:.1%} of {served['oracle_users']:,} equal to fp32 PyTorch's"
        console.print(
            f"served: {served['identical']:,} of {served['users']:,} rankings identical to the offline ones"
            + (compared if served["oracle_users"] else "")
        )
