"""`llamarec train-retriever`."""

import os
from pathlib import Path
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
from llamarec.tables import console, print_json, print_table
from preprocessing.errors import InputError


def train_retriever(
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    model: Model = None,
    loss: Loss = None,
    preset: Preset = "default",
    titles: Annotated[
        str | None,
        typer.Option(
            help="What the items' vectors contain of the titles: `none` (paper), `words`, or the states of a language"
            " `model`."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Language model that encodes the titles, with `--titles model`: a folder or hub name."),
    ] = None,
    untrained: Annotated[
        bool | None,
        typer.Option(help="Whether items that no training sequence contains are retrieved by their titles."),
    ] = None,
    signals: Annotated[
        bool | None,
        typer.Option(
            help="Whether popularity, title likeness, transitions and co-occurrence reorder the best items, with"
            " weights fitted on validation users."
        ),
    ] = None,
    second: Annotated[
        str | None,
        typer.Option(help="Preset of a second retriever, which is weighed together with the signals."),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Folder of an earlier retriever to go on from, such as artifacts/NAME/retriever; new items start from"
            " their titles.",
        ),
    ] = None,
    negatives: Annotated[
        int | None,
        typer.Option(help="Random items in the softmax's denominator, for large catalogues. Default: all items."),
    ] = None,
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
    validation_users: Annotated[
        int | None, typer.Option(help="Random users whose validation items stop the training. Default: all users.")
    ] = None,
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
    from models.ranker.base import EMBEDDED
    from models.retriever.options import PRESETS, RetrieverTraining
    from models.retriever.training import train_retriever as run

    options = from_preset(RetrieverTraining, PRESETS, preset, given)
    if options.titles == "model":
        from models.ranker.title_states import encode_titles

        encode_titles(artifacts, base or EMBEDDED, device=options.device, keep=start is not None)
    elif base is not None:
        raise InputError("--base names the language model that encodes titles: use it with --titles model")
    metrics = run(options, artifacts, start=start)
    if os.environ.get("RANK", "0") != "0":  # under `accelerate launch` only the first process prints
        return
    if as_json:
        print_json(metrics)
        return
    rows = [[split, *metrics[split].values()] for split in ("validation", "test")]
    if options.signals:
        rows += [[f"{split}, {options.model} alone", *row.values()] for split, row in metrics["model_alone"].items()]
    print_table(
        f"{options.model}: {metrics['steps']} steps, best at {metrics['best_step']}", ["", *metrics["test"]], rows
    )
    if options.signals:
        weights = ", ".join(f"{name} {weight:.3g}" for name, weight in metrics["weights"].items())
        console.print(f"weights of the signals: {weights}", soft_wrap=True)
