"""`llamarec train-ranker`."""

import os
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from llamarec.options import DEFAULT_ARTIFACTS, Artifacts, Device, Json, Seed, from_preset
from llamarec.tables import print_gain, print_json, print_table


def train_ranker(
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    base: Annotated[
        str | None,
        typer.Option(help="Hugging Face folder or hub name of a causal language model. Default: the preset's."),
    ] = None,
    preset: Annotated[
        str, typer.Option(help="`smollm2-135m` (the embedded base), `llama2-7b`, `paper`, `demo` or `quick`.")
    ] = "smollm2-135m",
    max_prompts: Annotated[
        int | None, typer.Option(help="Maximum number of training prompts, a random sample. Overrides the preset.")
    ] = None,
    negatives: Annotated[
        str | None,
        typer.Option(
            help="Training negatives: `random` (paper), `popular`, the `retriever`'s own lists, or random items from"
            " the `pool` of its best 200. The retriever is cross-fitted for the last two."
        ),
    ] = None,
    order: Annotated[str | None, typer.Option(help="Order of the candidates: `shuffled` or `retriever`.")] = None,
    pools: Annotated[
        int | None, typer.Option(help="Number of prompts per history, each with other candidates.")
    ] = None,
    candidates: Annotated[
        int | None, typer.Option(help="Candidates per prompt, 2 to 52; the server retrieves 20.")
    ] = None,
    read: Annotated[
        str | None,
        typer.Option(
            help="What the ranking is read from: the `letters` after the prompt (paper), the candidates' `lines`, or"
            " `independent-lines`, whose scores do not depend on the other candidates."
        ),
    ] = None,
    depth: Annotated[int | None, typer.Option(help="Maximum number of lower layers of the base that are kept.")] = None,
    targets: Annotated[
        str | None,
        typer.Option(help="Projections that get adapters, by their names in the base or in Llama: `q_proj,v_proj`."),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Number of upper layers that get adapters.")] = None,
    max_history: Annotated[int | None, typer.Option(help="Maximum number of history items in a prompt.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Maximum length of a prompt in tokens; the oldest history is dropped first.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Number of prompts in a step. Overrides the preset.")] = None,
    micro_batch_size: Annotated[
        int | None,
        typer.Option(
            help="Number of prompts computed at once; fewer need less memory, and more suit a large GPU. Default: 4."
        ),
    ] = None,
    checkpoint_minutes: Annotated[
        float | None,
        typer.Option(help="Minutes between two checkpoints; there is one after each validation too. Default: 10."),
    ] = None,
    seed: Seed = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Tune a Llama with LoRA to rank the retriever's candidates, keep the best validation, and merge it."""
    given = {**locals(), "targets": tuple(targets.split(",")) if targets else None}
    from models.ranker.base import EMBEDDED
    from models.ranker.options import PRESET_BASES, PRESETS, RankerTraining
    from models.ranker.training import train_ranker as run

    base = base or PRESET_BASES.get(preset, EMBEDDED)
    metrics = run(from_preset(RankerTraining, PRESETS, preset, given), artifacts, base)
    if os.environ.get("RANK", "0") != "0":  # under `accelerate launch` only the first process prints
        return
    if as_json:
        print_json(metrics)
        return
    measured = {name: values for name, values in metrics["validation"].items() if name != "users"}
    measured[f"untuned, {metrics['sample']['users']} users"] = metrics["sample"]["untuned"]
    rows = [[name, *values.values()] for name, values in measured.items()]
    title = f"{base}: best at step {metrics['best_step']}, retriever's weight {metrics['weight']:g}; validation of"
    print_table(f"{title} {metrics['validation']['users']} users", ["", *measured["fused"]], rows)
    print_worth(metrics)


def print_worth(metrics: Mapping[str, Any]) -> None:
    """Print what the language model added for the validation users of a training; earlier versions did not measure it.

    Args:
        metrics: see :func:`models.ranker.training.train_ranker`.
    """
    if gain := metrics.get("gain"):
        print_gain(gain, f"{metrics['validation']['users']:,} validation users with their next item in the list")
