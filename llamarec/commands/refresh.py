"""`llamarec refresh`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from llamarec.commands.release import Servers, controls
from llamarec.options import (
    DEFAULT_ARTIFACTS,
    DEFAULT_RELEASES,
    Artifacts,
    Delimiter,
    Device,
    Json,
    Releases,
    from_given,
)
from llamarec.tables import console, messages, print_json, print_table

REFUSED = 3
"""Exit code of a refresh whose candidate is worse than the serving release, so that all is as before."""


def refresh(
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    repository: Releases = DEFAULT_RELEASES,
    events: Annotated[
        Path | None,
        typer.Option(help="New events: file or folder, as `llamarec preprocess --append --raw` reads it."),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            envvar="LLAMAREC_STORE",
            help="Address of the store of histories. Without --events, its events that the artifacts lack are the new"
            " ones. Items that were added to it get their titles from there.",
        ),
    ] = None,
    dataset: Annotated[
        str, typer.Option(help="Kind of --events: `table`, or another one of `llamarec preprocess`.")
    ] = "table",
    user_column: Annotated[
        str | None, typer.Option(help="Column of the user ids. Default, for all four: as the artifacts were read.")
    ] = None,
    item_column: Annotated[str | None, typer.Option(help="Column of the item ids.")] = None,
    timestamp_column: Annotated[str | None, typer.Option(help="Column of the times.")] = None,
    title_column: Annotated[str | None, typer.Option(help="Column of the item titles.")] = None,
    delimiter: Delimiter = None,
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Skip and count rows that cannot be used, instead of stopping.")
    ] = False,
    scheduler_address: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of a Dask scheduler that preprocesses; its workers see the same files."),
    ] = None,
    ranker: Annotated[
        bool, typer.Option("--ranker", help="Train the ranker again. Default: the ranker of the serving release.")
    ] = False,
    device: Device = None,
    least_users: Annotated[
        int | None, typer.Option(help="Minimum number of users with a new last event. Default: 100.")
    ] = None,
    judge_users: Annotated[
        int | None,
        typer.Option(help="Maximum number of users by whom the ranker is judged, two passes each. Default: 200."),
    ] = None,
    release: Annotated[
        str | None, typer.Option(help="Release to compare with. Default: the one that is served.")
    ] = None,
    canary: Annotated[
        bool, typer.Option("--canary", help="Answer only the users that clients choose with `--canary 5%`.")
    ] = False,
    servers: Servers = None,
    as_json: Json = False,
) -> None:
    """Train on new events, compare the result with the serving release, and promote it unless it is worse.

    Both rank the newest event of each user, which neither was trained on. If the candidate is worse beyond the 95 %
    interval, the exit code is 3 and all is as before.
    """
    given = locals()
    from llamarec.refresh.events import Source
    from llamarec.refresh.run import Refresh
    from llamarec.refresh.run import refresh as run

    options = from_given(Refresh, given, {"source": from_given(Source, given)})
    report = run(options, artifacts, repository, controls(repository, servers), _say)
    print_json(report) if as_json else print_refresh(report, repository)
    if not report["accepted"]:
        raise typer.Exit(REFUSED)


def _say(sentence: str) -> None:
    messages.print(sentence, highlight=False, markup=False, soft_wrap=True)


def print_refresh(report: Mapping[str, Any], repository: Path) -> None:
    """Print the comparison of candidate and serving release, and what follows from it."""
    serving, unknown = report["serving"], report["unknown_to_serving"]
    rows = [
        [
            row["stage"],
            f"{row['users']:,}",
            metric,
            row[key]["candidate"],
            row[key]["serving"],
            "{mean:+.4f} [{low:+.4f}, {high:+.4f}]".format(**row[key]),
        ]
        for row in report["comparisons"]
        for key, metric in (("ndcg", "NDCG@10"), ("recall", "Recall@10"))
    ]
    print_table(
        f"{report['dataset']}: {report['new_events']:,} new events; the newest of each user, which"
        f" {unknown:,} times is an item that {serving} does not know",
        ["stage", "users", "", "candidate", serving, "difference"],
        rows,
    )
    console.print(_verdict(report, repository), soft_wrap=True, highlight=False, markup=False)


def _verdict(report: Mapping[str, Any], repository: Path) -> str:
    name, serving = report["release"], report["serving"]
    if not report["accepted"]:
        stages = " and ".join(row["stage"] for row in report["comparisons"] if row["worse"])
        return (
            f"the candidate is worse than {serving} in {stages}: it is not released, {serving} is still served, and"
            f" {report['artifacts']} can be looked at"
        )
    artifacts = f"its artifacts are {report['artifacts']}"
    if report["promoted"] is None:
        command = f"llamarec release promote {name} --repository {repository}"
        return f"{name} is built and not worse than {serving}; no server runs: `{command}` promotes it; {artifacts}"
    role = "the canary" if report["promoted"] == "canary" else "served"
    return f"{name} is not worse than {serving} and is {role} now; {artifacts}"
