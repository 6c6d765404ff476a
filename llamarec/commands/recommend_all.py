"""`llamarec recommend-all`."""

from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated

import typer

from llamarec.options import DEFAULT_REPOSITORY, Json, Repository, from_given
from llamarec.tables import print_row
from preprocessing.errors import InputError


def recommend_all(
    output: Annotated[
        Path, typer.Option(help="Folder for the recommendations: a new one, or that of an interrupted call.")
    ],
    artifacts: Annotated[
        Path | None,
        typer.Option(help="Folder of a data set's artifacts: recommend for its users, from all that they did."),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            envvar="LLAMAREC_STORE",
            help="Address of a store: recommend for its users, unless --artifacts is given. Its added items are"
            " recommended, and its hidden ones are not.",
        ),
    ] = None,
    repository: Repository = DEFAULT_REPOSITORY,
    stage: Annotated[
        str, typer.Option(help="`ranking`: the answers of `llamarec`; `retrieval`: those of `llamarec_retrieval`.")
    ] = "ranking",
    top_k: Annotated[int, typer.Option(help="Number of items for each user.")] = 20,
    partition_size: Annotated[
        int | None,
        typer.Option(help="Number of users in a Parquet file. Default: 100, or 10,000 with --stage retrieval."),
    ] = None,
    scheduler_address: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of a Dask scheduler that does the work; its workers must see the same files."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the recommendations of all users as Parquet, equal to what a server answers, without a server.

    A call that was interrupted is repeated, and goes on. From a repository of releases, the release that is served
    recommends.
    """
    given = locals()
    from serving.batch.recommend_all import NO_ITEMS, RecommendAll
    from serving.batch.recommend_all import recommend_all as run
    from serving.batch.users import ArtifactUsers, StoreUsers, Users
    from serving.server.releases import State
    from stores.address import open_store

    if artifacts is None and store is None:
        raise InputError("there is nobody to recommend for: give --artifacts DIR, or --store URL")
    options = from_given(RecommendAll, given)
    with ExitStack() as opened:
        listing = NO_ITEMS
        if store is not None:
            source = opened.enter_context(closing(open_store(store)))
            known = StoreUsers(source)  # before the listing: it makes no store where there is none
            listing = source.listing() or NO_ITEMS
        users: Users = known if artifacts is None else ArtifactUsers(artifacts)
        suffix = State.read(repository).suffix()
        facts = run(options, repository, users, output, listing=listing, suffix=suffix).facts
    print_row(f"recommendations in {output}", facts, as_json)
