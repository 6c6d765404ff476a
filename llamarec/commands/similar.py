"""`llamarec similar`."""

from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from llamarec.commands.recommend import titles
from llamarec.options import DEFAULT_ARTIFACTS, DEFAULT_REPOSITORY, Json, Repository, addresses, encode_id
from llamarec.tables import print_json, print_table
from llamarec_client.contract import SIMILAR_ITEMS


def similar(
    item: Annotated[str, typer.Argument(help="Raw item id.")],
    top_k: Annotated[int, typer.Option(help="Maximum number of items.")] = SIMILAR_ITEMS,
    repository: Repository = DEFAULT_REPOSITORY,
    store: Annotated[
        str | None,
        typer.Option(
            envvar="LLAMAREC_STORE", help="Address of a store, whose added items are found, and hidden ones are not."
        ),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of a running server, or of several, which is asked instead of --repository."),
    ] = None,
    artifacts: Annotated[
        Path, typer.Option(help="Folder of the artifacts, whose titles are shown where it exists.")
    ] = DEFAULT_ARTIFACTS,
    as_json: Json = False,
) -> None:
    """Print the items nearest to an item by transitions and titles, from the exported files or a running server."""
    rows = _served(server, item, top_k) if server is not None else _exported(repository, store, item, top_k)
    if as_json:
        print_json(rows)
        return
    title_of = titles(artifacts)
    signals = ("score", "transitions", "titles")
    cells = [
        [place, row["item_id"], title_of(row["item_id"]), *map(row.get, signals)] for place, row in enumerate(rows, 1)
    ]
    print_table(f"items like {item} {title_of(item)}".rstrip(), ["", "item", "title", *signals], cells)


def _served(servers: str, item: str, top_k: int) -> list[dict[str, Any]]:
    from llamarec_client import RecommenderClient

    with RecommenderClient(addresses(servers)) as client:
        return [asdict(row) for row in client.similar(item, top_k)]


def _exported(repository: Path, store: str | None, item: str, top_k: int) -> list[dict[str, Any]]:
    from serving.layout import exported_dataset, exported_release, step_artifact
    from serving.server.releases import State
    from serving.similar import SimilarItems
    from stores.address import open_store

    suffix = State.read(repository).suffix()
    exported_release(repository, suffix)  # checks that the export is whole
    folder = step_artifact(repository, "retriever", suffix)
    found = SimilarItems.load(folder)
    if store is not None:
        with closing(open_store(store, dataset=exported_dataset(folder))) as opened:
            listing = opened.listing()
        assert listing is not None  # no revision is known
        found = found.with_items(listing)
    rows = found(encode_id("item", item), top_k)
    return [{"item_id": row.item.decode(), **dict(zip(row._fields[1:], row[1:], strict=True))} for row in rows]
