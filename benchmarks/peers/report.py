"""Turns the recorded trainings into tables: speed, memory and quality, and the minutes to the same quality."""

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

SHARES = (0.25, 0.5, 0.75, 0.9, 0.95, 1.0)
"""Shares of the target for which the minutes are reported."""
Curve = Sequence[Mapping[str, float]]
"""The validations of a training, in order; see :class:`benchmarks.peers.training.Validation`."""


def seconds_an_epoch(curve: Curve) -> float:
    """Return the median over the intervals between two validations."""
    points = [(0, 0.0), *((int(point["epochs"]), point["seconds"]) for point in curve)]
    return statistics.median((end - start) / (to - since) for (since, start), (to, end) in pairwise(points))


def seconds_to(curve: Curve, target: float) -> float | None:
    """Return the seconds of training after which a validation first reached the target; None if none did."""
    return next((point["seconds"] for point in curve if point["recall"] >= target), None)


def times_longer(ours: Curve, theirs: Curve, target: float) -> tuple[float, bool] | None:
    """Return how many times longer their training took to the target, and whether that is exact.

    If they did not reach it, the number is a lower bound: they trained for that long without reaching it. If ours did
    not reach it, there is no number.
    """
    mine, other = seconds_to(ours, target), seconds_to(theirs, target)
    if mine is None:
        return None
    return (theirs[-1]["seconds"] if other is None else other) / mine, other is not None


def markdown(systems: Mapping[str, Mapping[str, Any]], target: float | None = None) -> str:
    """Return the tables in Markdown.

    Args:
        systems: what each system's training recorded, by the system's name.
        target: validation Recall@10 to be reached. By default, it is the best that ours reached.
    """
    curves: dict[str, Curve] = {name: facts["curve"] for name, facts in systems.items()}
    rows = [
        "| system | steps an epoch | seconds an epoch | peak memory | minutes of training | best validation Recall@10"
        " | test Recall@10 | test NDCG@10 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, facts in systems.items():
        curve, test = curves[name], facts["test"]
        best = max(point["recall"] for point in curve)
        rows.append(
            f"| {name} | {curve[-1]['steps'] / curve[-1]['epochs']:.0f} | {seconds_an_epoch(curve):.1f}"
            f" | {facts['peak_mib']:,} MiB | {curve[-1]['seconds'] / 60:.1f} ({_ending(facts['stopped'])})"
            f" | {best:.4f} | {test['Recall@10']:.4f} | {test['NDCG@10']:.4f} |"
        )
    if "ours" in curves or target is not None:
        rows += ["", *_quality_rows(curves, target or max(point["recall"] for point in curves["ours"]))]
    return "\n".join(rows)


def _ending(stopped: str) -> str:
    return {"limit": "the limit", "patience": "no longer rising"}[stopped]


def _quality_rows(curves: Mapping[str, Curve], target: float) -> list[str]:
    """Return the table of the minutes to each share of the target."""
    rows = [
        "| validation Recall@10 | " + " | ".join(curves) + " |",
        "|---|" + "---|" * len(curves),
    ]
    for share in SHARES:
        cells = [_minutes(name, curves, share * target) for name in curves]
        rows.append(f"| {share * target:.4f} ({share:.0%} of {target:.4f}) | " + " | ".join(cells) + " |")
    return rows


def _minutes(name: str, curves: Mapping[str, Curve], target: float) -> str:
    curve = curves[name]
    reached = seconds_to(curve, target)
    cell = f"{reached / 60:.1f}" if reached is not None else f"not within {curve[-1]['seconds'] / 60:.1f}"
    ratio = times_longer(curves["ours"], curve, target) if name != "ours" and "ours" in curves else None
    if ratio is None:
        return cell
    times, exact = ratio
    return f"{cell} ({'' if exact else 'at least '}{times:.1f} times ours)"
