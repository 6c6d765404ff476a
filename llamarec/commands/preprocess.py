"""`llamarec preprocess`."""

from pathlib import Path
from typing import Annotated

import typer

from llamarec.options import DEFAULT_ARTIFACTS, Artifacts, Json, from_given
from llamarec.tables import print_row


def preprocess(
    dataset: Annotated[
        str, typer.Option(help="`movielens-100k`, `movielens`, `amazon` or `table` (any CSV or Parquet).")
    ] = "movielens-100k",
    raw: Annotated[
        Path | None,
        typer.Option(help="Raw file or folder. `movielens-100k` is included; `movielens` and `amazon` are downloaded."),
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
    skip_bad_lines: Annotated[
        bool,
        typer.Option("--skip-bad-lines", help="Skip and count lines that cannot be read, instead of stopping."),
    ] = False,
    scheduler_address: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of a Dask scheduler that does the work; its workers must see the same files."),
    ] = None,
    append: Annotated[
        bool,
        typer.Option("--append", help="The raw files hold further events of the data set in --artifacts."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Turn raw interactions and titles into sequences: title filter, iterative 5-core, leave-one-out split."""
    given = locals()
    from preprocessing.preprocess import Preprocessing
    from preprocessing.preprocess import preprocess as run

    statistics = run(from_given(Preprocessing, given), artifacts)
    print_row("the paper's Table 2", statistics.row(), as_json)
