"""`llamarec events`: fills the store of histories."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from llamarec.options import Delimiter, Json, Store
from llamarec.tables import print_row

events = typer.Typer(help="What users did, in the store of histories.", no_args_is_help=True)


@events.callback()
def group() -> None:
    """Keep `load` a command of its own, since typer would otherwise take its only command for the group."""


@events.command()
def load(
    source: Annotated[
        Path,
        typer.Argument(help="CSV or Parquet, a folder of such files, or the artifacts of `llamarec preprocess`."),
    ],
    store: Store,
    user_column: Annotated[str, typer.Option(help="Column of the user ids.")] = "user",
    item_column: Annotated[str, typer.Option(help="Column of the item ids.")] = "item",
    timestamp_column: Annotated[str, typer.Option(help="Column of the times.")] = "timestamp",
    delimiter: Delimiter = None,
    kind: Annotated[str, typer.Option(help="What happened, for all of these events.")] = "view",
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Skip and count rows that cannot be used, instead of stopping.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Record the events of a file or a data set. Loading them again changes nothing."""
    from preprocessing.sources import Layout, separator
    from stores.loading import load_events

    layout = Layout(user_column, item_column, timestamp_column, delimiter=separator(delimiter))
    loaded = load_events(source, store, layout, kind=kind, skip=skip_bad_lines)
    print_row("loaded", asdict(loaded), as_json)
