"""`llamarec preprocess`."""

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llamarec.options import DEFAULT_ARTIFACTS, Artifacts, Json, from_given
from llamarec.tables import console, messages, print_json, print_row

if TYPE_CHECKING:
    from preprocessing.preprocess import AddedTitles


def preprocess(
    dataset: Annotated[
        str, typer.Option(help="`movielens-100k`, `movielens`, `amazon` or `table` (CSV or Parquet of your own).")
    ] = "movielens-100k",
    raw: Annotated[
        Path | None,
        typer.Option(
            help="Raw file, or folder, which is read with all its subfolders. `movielens-100k` is included; `movielens`"
            " and `amazon` are downloaded."
        ),
    ] = None,
    edition: Annotated[
        str | None,
        typer.Option(help="What to download: `ml-latest-small` to `ml-32m`, or an Amazon category of 2014."),
    ] = None,
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    user_column: Annotated[str, typer.Option(help="Column of the user ids, for `table`.")] = "user",
    item_column: Annotated[str, typer.Option(help="Column of the item ids, for `table`.")] = "item",
    timestamp_column: Annotated[str, typer.Option(help="Column of the times, for `table`.")] = "timestamp",
    title_column: Annotated[str, typer.Option(help="Column of the item titles, for `table`.")] = "title",
    group_column: Annotated[
        str | None,
        typer.Option(
            help="Column or field with the group of each item, for policies: `genres` of MovieLens, `brand` or"
            " `categories` of Amazon, any of a `table`. Default: no groups."
        ),
    ] = None,
    delimiter: Annotated[
        str | None,
        typer.Option(help="Separator in text files of a `table`: `;`, `tab`. Default: a tab for .tsv, else a comma."),
    ] = None,
    skip_bad_lines: Annotated[
        bool,
        typer.Option("--skip-bad-lines", help="Skip and count rows that cannot be used, instead of stopping."),
    ] = False,
    scheduler_address: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of a Dask scheduler that does the work; its workers must see the same files."),
    ] = None,
    append: Annotated[
        bool,
        typer.Option("--append", help="The raw files hold further events of the data set in --artifacts."),
    ] = False,
    store: Annotated[
        str | None,
        typer.Option(
            help="Address of a store. The items that `llamarec items add` added to it get their titles from there."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn raw interactions and titles into sequences: title filter, iterative 5-core, leave-one-out split.

    At the end it reports what was read, in which unit the times were, and what was left out and why.
    """
    given = locals()
    from preprocessing.preprocess import Preprocessing, read_report
    from preprocessing.preprocess import preprocess as run
    from preprocessing.report import sentences

    options = from_given(Preprocessing, given)
    row = run(options, artifacts, _added_titles(store) if store else None).row()
    report = read_report(artifacts)
    if as_json:
        print_json({**row, "reading": report})
        return
    for sentence in sentences(report) if report else ():
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    print_row("the paper's Table 2", row, as_json)


def _added_titles(url: str) -> "AddedTitles":
    """Return the titles of the items that were added to a store, and say how many there are."""
    from preprocessing.preprocess import AddedTitles
    from stores.address import open_store

    with closing(open_store(url)) as store:
        listing, dataset = store.listing(), store.dataset()
    assert listing is not None  # no revision is known
    messages.print(f"{len(listing.added):,} items were added to the store", highlight=False)
    return AddedTitles({item.decode(): title for item, title in listing.added}, dataset)
