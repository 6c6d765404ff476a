"""`llamarec recommend`."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llamarec.options import DEFAULT_ARTIFACTS, DEFAULT_SERVER, Json, Server, addresses
from llamarec.tables import print_json, print_table
from llamarec_client.contract import ENSEMBLE, POLICY_FIELDS
from preprocessing.errors import InputError

if TYPE_CHECKING:
    from llamarec_client import Policy


def recommend(
    history: Annotated[
        list[str] | None,
        typer.Option(help="Raw item id, oldest first; repeatable. Default: what the server's store has of --user."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Raw item id that must not be returned; repeatable.")
    ] = None,
    candidates: Annotated[
        list[str] | None, typer.Option(help="Raw item id to rank instead of retrieving; repeatable.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Number of items to return. Default: all candidates.")] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="JSON object, or a file with one: max_per_group, only_groups, never_groups, boosts, repeats. Default:"
            " that of the server's release."
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="`llamarec`, or `llamarec_retrieval` without the ranker.")] = ENSEMBLE,
    user: Annotated[str | None, typer.Option(help="User id: for the history, the logs and a canary.")] = None,
    canary: Annotated[str, typer.Option(help="Share of the users that the canary release answers: `5%`.")] = "0%",
    server: Server = DEFAULT_SERVER,
    artifacts: Annotated[
        Path, typer.Option(help="Folder of the artifacts, whose titles are shown where it exists.")
    ] = DEFAULT_ARTIFACTS,
    as_json: Json = False,
) -> None:
    """Ask a running server for one user's recommendations."""
    from llamarec_client import RecommenderClient
    from llamarec_client.canary import canary_model, parse_share

    model = canary_model(model, user, parse_share(canary))
    with RecommenderClient(addresses(server)) as client:
        answer = client.recommend(
            history or (None if user else []),
            exclude=exclude,
            candidates=candidates,
            top_k=top_k,
            user_id=user,
            policy=read_policy(policy) if policy else None,
            model=model,
        )
    if as_json:
        print_json([asdict(recommendation) for recommendation in answer])
        return
    title_of = titles(artifacts)
    rows = [[place, r.item_id, title_of(r.item_id), r.score, r.retriever_rank] for place, r in enumerate(answer, 1)]
    print_table("recommendations", ["", "item", "title", "score", "retriever rank"], rows)


def read_policy(given: str) -> "Policy":
    """Return the policy in a JSON text, or in a file.

    Raises:
        InputError: there is no such file, or it holds no JSON object with the fields of a policy.
    """
    from llamarec_client import Policy

    named, text = "--policy", given
    if not given.lstrip().startswith("{"):
        named = given
        try:
            text = Path(given).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"--policy {given} cannot be read ({error}): give a file, or a JSON object") from None
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise InputError(f'{named} is not JSON ({error}): give one object, such as {{"max_per_group": 2}}') from None
    unknown = set(fields) - set(POLICY_FIELDS) if isinstance(fields, dict) else {"no object"}
    if unknown:
        raise InputError(f"{named} holds {', '.join(sorted(unknown))}: a policy has {', '.join(POLICY_FIELDS)}")
    return Policy(**fields)


def titles(artifacts: Path) -> Callable[[str], str]:
    """Return a look-up of titles by raw id; without the data set's artifacts every title is empty."""
    from preprocessing.catalogue import ITEMS_FILE, Catalogue

    path = artifacts / "data" / ITEMS_FILE
    return Catalogue.load(path).title_of if path.is_file() else lambda raw_id: ""
