"""`llamarec feedback`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from llamarec.options import Delimiter, Json
from llamarec.tables import console, print_json, print_table


def feedback(
    answers: Annotated[
        Path, typer.Option(envvar="LLAMAREC_ANSWERS", help="Folder that `llamarec serve --answers` filled.")
    ],
    events: Annotated[
        str,
        typer.Option(
            help="What users did: CSV or Parquet, a folder of such files, the artifacts of `llamarec preprocess`, or"
            " the address of a store, as `sqlite:///FILE`."
        ),
    ],
    window: Annotated[
        float, typer.Option(help="Seconds after an answer within which an event counts for it.")
    ] = 3600.0,
    user_column: Annotated[str, typer.Option(help="Column of the user ids.")] = "user",
    item_column: Annotated[str, typer.Option(help="Column of the item ids.")] = "item",
    timestamp_column: Annotated[str, typer.Option(help="Column of the times.")] = "timestamp",
    delimiter: Delimiter = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file for a plot of the releases.")] = None,
    as_json: Json = False,
) -> None:
    """Print what users took of what they were shown, by release, and which release is better."""
    from preprocessing.sources import Layout, separator
    from serving.feedback.report import feedback as run
    from serving.feedback.report import plot as draw

    layout = Layout(user_column, item_column, timestamp_column, delimiter=separator(delimiter))
    result = run(answers, events, window=window, layout=layout)
    if plot is not None:
        draw(result, plot)
    print_json(result) if as_json else print_feedback(result)


def print_feedback(result: Mapping[str, Any]) -> None:
    """Print the releases, their differences, and how the ranker moved what was taken."""
    releases = result["releases"]
    print_table(
        f"{result['dataset']}: {result['answers']:,} answers to users with an id,"
        f" {result['followed_answers']:,} of them followed by events within {result['window_s']:,g} s",
        ["release", "answers", "users", "fallbacks", "hits", "hit rate", "MRR", "NDCG"],
        [
            [
                *(row[name] if name == "release" else f"{row[name]:,}" for name in ("release", "answers", "users")),
                *(f"{row[name]:,}" for name in ("fallbacks", "hits")),
                *(_interval(row[name]) for name in ("hit_rate", "mrr", "ndcg")),
            ]
            for row in releases
        ],
    )
    if moved := [(row["release"], row["moved"]) for row in releases if row["moved"]]:
        print_table(
            "taken items, moved by the ranker from the retriever's rank",
            ["release", "items", "up", "down", "places up on average"],
            [
                [name, f"{row['items']:,}", _interval(row["up"]), _interval(row["down"]), _interval(row["places"], "+")]
                for name, row in moved
            ],
        )
    for row in result["differences"]:
        print_difference(row)


def print_difference(row: Mapping[str, Any]) -> None:
    """Print the difference between two releases, and what follows from its interval."""
    names = ("hit_rate", "mrr", "ndcg")
    lines = [["all answers", *(_interval(row[name], "+") for name in names)]]
    if weighted := row["weighted"]:
        lines.append([f"weighted by day ({weighted['days']:,})", *(_interval(weighted[name], "+") for name in names)])
    print_table(f"{row['release']} minus {row['baseline']}", ["", "hit rate", "MRR", "NDCG"], lines)
    hits = (weighted or row)["hit_rate"]
    if hits["low"] > 0:
        verdict = f"more is taken from {row['release']}"
    elif hits["high"] < 0:
        verdict = f"less is taken from {row['release']}"
    else:
        verdict = "the hit rates do not differ, as far as these answers can tell"
        if row["answers_needed"]:
            verdict += f"; a difference of this size takes about {row['answers_needed']:,} answers to tell"
    console.print(verdict, soft_wrap=True, highlight=False, markup=False)


def _interval(estimate: Mapping[str, float], sign: str = "") -> str:
    return "{value:{sign}.4f} [{low:{sign}.4f}, {high:{sign}.4f}]".format(sign=sign, **estimate)
