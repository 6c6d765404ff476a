"""`llamarec train-retriever`."""

import os
from typing import Annotated

import typer

from llamarec.options import (
    DEFAULT_ARTIFACTS,
    Artifacts,
    Device,
    Epochs,
    Json,
    Loss,
    Model,
    Patience,
    Preset,
    Seed,
    ValidateEvery,
    from_preset,
)
from llamarec.tables import print_json, print_table


def train_retriever(
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    model: Model = None,
    loss: Loss = None,
    preset: Preset = "paper",
    epochs: Epochs = None,
    max_length: Annotated[int | None, typer.Option(help="Number of most recent items that the model reads.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Training windows per step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Step size of AdamW.")] = None,
    dropout: Annotated[float | None, typer.Option(help="Share of activations that are dropped.")] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="Weight decay of AdamW, except on biases and norms.")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads of SASRec and BERT4Rec.")] = None,
    masked_share: Annotated[float | None, typer.Option(help="Share of items that BERT4Rec masks in training.")] = None,
    validate_every: ValidateEvery = None,
    patience: Patience = None,
    mask: Annotated[
        str | None,
        typer.Option(
            help="Items that are never recommended: the whole `history`, or its `last-window` as in LRURec's own code."
        ),
    ] = None,
    seed: Seed = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train the retriever with early stopping on validation Recall@10, and write every user's top 20."""
    given = locals()
    from models.retriever.options import PRESETS, RetrieverTraining
    from models.retriever.training import train_retriever as run

    options = from_preset(RetrieverTraining, PRESETS, preset, given)
    metrics = run(options, artifacts)
    if os.environ.get("RANK", "0") != "0":  # under `accelerate launch` only the first process prints
        return
    if as_json:
        print_json(metrics)
        return
    rows = [[split, *metrics[split].values()] for split in ("validation", "test")]
    print_table(
        f"{options.model}: {metrics['steps']} steps, best at {metrics['best_step']}", ["", *metrics["test"]], rows
    )
