"""Plots the curves of a ranker's training."""

from collections.abc import Sequence
from pathlib import Path

CURVES_FILE = "curves.png"


def plot_curves(log: Sequence[dict[str, float]], path: Path) -> None:
    """Write a PNG of the training loss and both validation NDCG@10 over the steps.

    Args:
        log: see :class:`models.ranker.fitting.loop.TrainingProgress`.
        path: the PNG file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    losses, validations = figure.subplots(1, 2)
    for axes, name, label in (
        (losses, "loss", "training loss"),
        (validations, "NDCG@10", "language model alone"),
        (validations, "fused NDCG@10", "fused"),
    ):
        rows = [row for row in log if name in row]
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], marker="o", markersize=3, label=label)
    losses.set(xlabel="step", ylabel="training loss")
    validations.set(xlabel="step", ylabel="validation NDCG@10")
    validations.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})
