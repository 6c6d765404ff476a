"""`llamarec tune`: searches a retriever's dropout and weight decay."""

from typing import Annotated

import typer

from llamarec.options import (
    DEFAULT_ARTIFACTS,
    Artifacts,
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


def tune(
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    model: Model = None,
    preset: Preset = "paper",
    space: Annotated[
        str,
        typer.Option(help="`paper`, its full grid of 10; `dropout`, 6 values of it; or `wide`, ranges of both."),
    ] = "paper",
    budget: Annotated[
        int, typer.Option(help="Total number of trainings; a larger number continues an earlier search.")
    ] = 10,
    loss: Loss = None,
    epochs: Epochs = None,
    validate_every: ValidateEvery = None,
    patience: Patience = None,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Search dropout and weight decay by validation Recall@10. Poor trainings are pruned, a stopped search resumes."""
    given = locals()
    from models.retriever.options import PRESETS, RetrieverTraining
    from models.retriever.search import SPACES, Search, search

    training = from_preset(RetrieverTraining, PRESETS, preset, given)
    result = search(Search(training=training, space=space, budget=budget), artifacts)
    if as_json:
        print_json(result)
        return
    title = f"{result['model']} on {result['dataset']}: {len(result['trials'])} trainings"
    print_table(title, list(result["best"]), [list(row.values()) for row in result["trials"]])
    chosen = " ".join(f"--{name.replace('_', '-')} {result['best'][name]:g}" for name in SPACES[space])
    console.print(
        f"best: llamarec train-retriever --preset {preset} --model {result['model']} {chosen}", soft_wrap=True
    )
