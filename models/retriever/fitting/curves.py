"""Plots the curves of a retriever's training."""

from collections.abc import Sequence
from pathlib import Path


def plot_curve(curve: Sequence[tuple[int, float | None, float]], title: str, path: Path) -> None:
    """Write a PNG of the training loss and validation Recall@10 over the steps.

    Args:
        curve: for each validation: step, mean training loss since the previous one (None at the first) and Recall@10.
        title: title of the plot.
        path: the PNG file.
    """
    from matplotlib.figure import Figure

    steps, losses, reached = zip(*curve, strict=True)
    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.subplots()
    left.plot(steps, reached, marker="o", markersize=3, color="C0")
    best = max(range(len(reached)), key=lambda place: reached[place])
    left.axvline(steps[best], color="grey", linestyle=":", linewidth=1)
    left.set(title=title, xlabel="step", ylim=(0, None))
    left.set_ylabel("validation Recall@10", color="C0")
    right = left.twinx()
    right.plot(steps, [float("nan") if loss is None else loss for loss in losses], color="C1")
    right.set_ylabel("training loss", color="C1")
    figure.savefig(path, dpi=120)
