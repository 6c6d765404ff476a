"""`llamarec items`: adds, hides and shows items while servers run."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from llamarec.options import Delimiter, Json, Store, encode_id
from llamarec.tables import print_json, print_row, print_table
from llamarec_client.contract import MAX_ID_BYTES
from preprocessing.errors import InputError
from preprocessing.report import shortened

items = typer.Typer(help="Items that are added and hidden while servers run, in the store.", no_args_is_help=True)
Ids = Annotated[list[str], typer.Argument(help="Item ids.", metavar="ID")]


@items.command()
def add(
    source: Annotated[
        Path, typer.Argument(metavar="FILE", help="CSV or Parquet with ids and titles, or a folder of such files.")
    ],
    store: Store,
    item_column: Annotated[str, typer.Option(help="Column of the item ids.")] = "item",
    title_column: Annotated[str, typer.Option(help="Column of the titles.")] = "title",
    delimiter: Delimiter = None,
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Skip and count rows that cannot be used, instead of stopping.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Add the items of a file, or change their titles. Adding them again changes nothing."""
    from preprocessing.sources import Layout, separator
    from stores.loading import load_items

    layout = Layout(item=item_column, title=title_column, delimiter=separator(delimiter))
    print_row("added", asdict(load_items(source, store, layout, skip=skip_bad_lines)), as_json)


@items.command()
def hide(ids: Ids, store: Store, as_json: Json = False) -> None:
    """Hide items: no answer has them, until they are shown again. Items that no model knows may be hidden too."""
    from stores.address import open_store

    with closing(open_store(store)) as opened:
        _print_changed("hidden", ids, opened.hide, as_json)


@items.command()
def show(ids: Ids, store: Store, as_json: Json = False) -> None:
    """Show hidden items again."""
    from stores.address import open_store

    with closing(open_store(store)) as opened:
        _print_changed("shown", ids, opened.show, as_json)


@items.command("list")
def list_items(store: Store, as_json: Json = False) -> None:
    """Print the added items in the order in which they were added, then the hidden ones that were not added."""
    from stores.address import open_store

    with closing(open_store(store)) as opened:
        listing = opened.listing()
    assert listing is not None  # no revision is known
    rows: list[tuple[str, str | None, bool]] = [
        (item.decode(), title, item in listing.hidden) for item, title in listing.added
    ]
    others = listing.hidden - {added.item for added in listing.added}
    rows += [(item.decode(), None, True) for item in sorted(others)]
    if as_json:
        print_json([{"item": item, "title": title, "hidden": hidden} for item, title, hidden in rows])
        return
    print_table(
        f"{len(listing.added):,} added, {len(listing.hidden):,} hidden",
        ["item", "title", "hidden"],
        [[item, title or "", "yes" if hidden else ""] for item, title, hidden in rows],
    )


def _print_changed(title: str, ids: Sequence[str], change: Callable[[Sequence[bytes]], int], as_json: bool) -> None:
    """Print how many items were changed.

    Raises:
        InputError: an id cannot be one.
    """
    changed = change([_encoded(item) for item in ids])
    print_row(title, {"items": len(set(ids)), "changed": changed}, as_json)


def _encoded(item: str) -> bytes:
    """Return an item id as the store keeps it.

    Raises:
        InputError: it is not one.
    """
    encoded = encode_id("item id", item)
    if not item.strip():
        raise InputError(f"an item id is empty: give 1 to {MAX_ID_BYTES} bytes")
    if len(encoded) > MAX_ID_BYTES:
        raise InputError(f"the item id {shortened(item)} has {len(encoded)} bytes: give 1 to {MAX_ID_BYTES}")
    return encoded
