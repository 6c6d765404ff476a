"""Puts together what answers were worth, and plots it."""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preprocessing.errors import InputError
from preprocessing.sources import Layout
from serving.feedback.joining import join
from serving.feedback.measures import ENOUGH_HITS, MEASURES, differences, release_measures
from serving.feedback.reading import read_answers, read_user_events

LABELS = {"hit_rate": "hit rate", "mrr": "MRR", "ndcg": "NDCG"}


def feedback(folder: Path, events: str, *, window: float, layout: Layout | None = None) -> dict[str, Any]:
    """Return what the answers of a log were worth, as `llamarec feedback --json` prints it.

    Args:
        folder: of the log of answers.
        events: file or folder of events, artifacts, or address of a store.
        window: seconds after an answer within which an event counts for it.
        layout: columns of the files of events.

    Raises:
        InputError: answers and events do not belong together, or are too few to tell anything; the sentence says what
            to do.
        StoreError: the store cannot be reached.
    """
    if not 0 < window < math.inf:
        raise InputError(f"--window is {window:g}: give a number of seconds above 0")
    answers = read_answers(folder)
    happened = read_user_events(events, answers, layout)
    joined = join(answers, happened, window)
    releases = release_measures(joined)
    _check_hits(releases)
    return {
        "dataset": answers.dataset,
        "window_s": window,
        "answers": len(joined.user),
        "anonymous_answers": answers.anonymous,
        "replaced_answers": answers.replaced,
        "followed_answers": int((joined.events > 0).sum()),
        "taken_items": int(joined.events.sum()),
        "unusable_events": happened.skipped,
        "releases": releases,
        "differences": differences(joined, releases),
    }


def _check_hits(releases: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a log in which no release has enough hits for an interval."""
    most = max(releases, key=lambda row: row["hits"])
    if most["hits"] >= ENOUGH_HITS:
        return
    answers, hits = most["answers"], most["hits"]
    # Without any hit, 3 / answers is a rate that 95 % of such logs would exclude ("rule of three").
    needed = math.ceil(ENOUGH_HITS * answers / max(hits, 3))
    raise InputError(
        f"{hits} of the {answers:,} answers of {most['release']} showed something that was taken, which is too few to"
        f" tell anything: about {ENOUGH_HITS} are needed, so collect {'at least' if not hits else 'about'}"
        f" {needed:,} answers"
    )


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Write a PNG of the three measures of each release with their intervals.

    Args:
        result: what :func:`feedback` returned.
        path: the PNG file.

    Raises:
        InputError: matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib: `pip install 'llamarec[models]'`")
    from matplotlib.figure import Figure

    rows = result["releases"]
    figure = Figure(figsize=(9, 1.6 + 0.5 * len(rows)), layout="constrained")
    places = range(len(rows))
    for axes, name in zip(figure.subplots(1, len(MEASURES), sharey=True), MEASURES, strict=True):
        values = [row[name]["value"] for row in rows]
        below = [value - row[name]["low"] for value, row in zip(values, rows, strict=True)]
        above = [row[name]["high"] - value for value, row in zip(values, rows, strict=True)]
        axes.errorbar(values, places, xerr=[below, above], fmt="o", color="#0b7a5b", capsize=3)
        axes.set(title=LABELS[name], ylim=(len(rows) - 0.5, -0.5))
        axes.set_yticks(places, [f"{row['release']}\n{row['answers']:,} answers" for row in rows])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.25)
        axes.locator_params(axis="x", nbins=4)
    figure.suptitle(f"What answers were worth: items taken within {result['window_s']:,g} s, with 95 % intervals")
    figure.savefig(path, format="png", dpi=120)
