"""The state of a ranker's training, kept so that an interrupted one goes on where it was, and its curves."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHECKPOINT_FILE = "checkpoint.pt"
CURVES_FILE = "curves.png"


@dataclass
class Progress:
    """How far a training has come. Tensors, numbers and strings only: it is loaded with ``weights_only``."""

    step: int = 0
    """Steps that are done."""
    validated: int = -1
    """Step of the latest validation."""
    best: float = -1.0
    """NDCG@10 of the best validation, of the language model alone or fused."""
    best_step: int = 0
    waited: int = 0
    """Validations since the best one."""
    seconds: float = 0.0
    """Spent training, validations aside."""
    losses: list[float] = field(default_factory=list)
    """Of the steps since the latest validation."""
    log: list[dict[str, float]] = field(default_factory=list)
    """Per validation: step, mean loss since the last, NDCG@10 of the language model alone and fused."""
    untuned: list[Tensor] = field(default_factory=list)
    """The language model's log-probabilities [k] of each validation example before the first step."""
    logprobs: list[Tensor] = field(default_factory=list)
    """The same at the best validation."""
    best_adapters: list[Tensor] = field(default_factory=list)


def save_checkpoint(folder: Path, key: str, progress: Progress, adapters: Sequence[Tensor], optimizer: Any) -> None:
    """Writes everything the next step depends on; an older checkpoint stays whole until the new one is.

    Args:
        folder: of the training; made if absent.
        key: of the options and inputs that the training belongs to.
        progress: how far it has come.
        adapters: what is trained.
        optimizer: its state is kept. The schedule follows from the step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        "key": key,
        "progress": {entry.name: getattr(progress, entry.name) for entry in fields(progress)},
        "adapters": [adapter.detach() for adapter in adapters],
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    partial = folder / f".{CHECKPOINT_FILE}"
    torch.save(state, partial)
    os.replace(partial, folder / CHECKPOINT_FILE)


def load_checkpoint(folder: Path, key: str, adapters: Sequence[Tensor], optimizer: Any) -> Progress | None:
    """Puts adapters, optimizer and random numbers back where the checkpoint left them.

    Returns:
        how far the training had come; None where there is no checkpoint of these options and inputs.
    """
    path = folder / CHECKPOINT_FILE
    if not path.is_file():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["key"] != key:
        return None
    with torch.no_grad():
        for adapter, value in zip(adapters, state["adapters"], strict=True):
            adapter.copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["random_cuda"])
    return Progress(**state["progress"])


def plot_curves(log: Sequence[dict[str, float]], path: Path) -> None:
    """Draws training loss and both validation NDCG@10 over the steps.

    Args:
        log: of :class:`Progress`.
        path: of the PNG.
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
