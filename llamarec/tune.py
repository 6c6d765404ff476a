"""`llamarec tune`: the search for a retriever's dropout and weight decay."""

from typing import Annotated

import typer

from llamarec.options import DEFAULT_ARTIFACTS, Artifacts, Json, Preset, from_preset
from llamarec.tables import console, print_json, print_table


def tune(
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    model: Annotated[str | None, typer.Option(help="Architecture to tune; default: the preset's.")] = None,
    preset: Preset = "paper",
    space: Annotated[
        str, typer.Option(help="`paper`, its full grid of 10; `dropout`, 6 of them; or `wide`, ranges of both.")
    ] = "paper",
    budget: Annotated[int, typer.Option(help="Trainings in all; a larger number continues an earlier search.")] = 10,
    loss: Annotated[str | None, typer.Option(help="As of `train-retriever`.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Most of each training; default: the preset's.")] = None,
    validate_every: Annotated[int | None, typer.Option(help="Steps between two validations.")] = None,
    patience: Annotated[int | None, typer.Option(help="Validations without a better one.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of every training, and of the search.")] = None,
    as_json: Json = False,
) -> None:
    """Search dropout and weight decay by validation Recall@10; poor trainings are pruned, a stopped search goes on."""
    from models.retriever.options import PRESETS, RetrieverTraining
    from models.retriever.tuning import SPACES, Tuning
    from models.retriever.tuning import tune as run

    training = from_preset(
        RetrieverTraining,
        PRESETS,
        preset,
        model=model,
        loss=loss,
        epochs=epochs,
        validate_every=validate_every,
        patience=patience,
        seed=seed,
    )
    result = run(Tuning(training=training, space=space, budget=budget), artifacts)
    if as_json:
        print_json(result)
        return
    title = f"{result['model']} on {result['dataset']}: {len(result['trials'])} trainings"
    print_table(title, list(result["best"]), [list(row.values()) for row in result["trials"]])
    chosen = " ".join(f"--{name.replace('_', '-')} {result['best'][name]:g}" for name in SPACES[space])
    console.print(
        f"best: llamarec train-retriever --preset {preset} --model {result['model']} {chosen}", soft_wrap=True
    )
