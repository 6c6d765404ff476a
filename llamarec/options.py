"""What several commands take, and a stage's options from a named preset and what the command line changed of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from preprocessing.errors import InputError

Artifacts = Annotated[Path, typer.Option(help="Folder of the data set's artifacts; each stage writes a folder in it.")]
Repository = Annotated[Path, typer.Option(help="The Triton model repository.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output instead of a table.")]
Preset = Annotated[str, typer.Option(help="Named options: `demo` (minutes on two cores) or one of the paper's.")]
Model = Annotated[
    str | None,
    typer.Option(help="`lrurec`, the paper's retriever, or `sasrec`, `bert4rec`, `narm`; default: the preset's."),
]
Loss = Annotated[
    str | None, typer.Option(help="`softmax` over all items, or `binary`, SASRec's own; default: the model's.")
]
Epochs = Annotated[int | None, typer.Option(help="Instead of the preset's.")]
ValidateEvery = Annotated[int | None, typer.Option(help="Steps between two validations.")]
Patience = Annotated[int | None, typer.Option(help="Validations without a better Recall@10 before a training stops.")]
Seed = Annotated[int | None, typer.Option(help="Of whatever is drawn: initialisation, shuffling, sampling.")]
DEFAULT_ARTIFACTS = Path("artifacts/movielens-100k")
DEFAULT_REPOSITORY = Path("model_repository")
Options = TypeVar("Options")


def from_preset(
    options: type[Options], presets: Mapping[str, Mapping[str, Any]], preset: str, **given: object
) -> Options:
    """The stage's options: its defaults, then the preset, then every given value that is not None.

    Raises:
        InputError: there is no such preset, or a value is out of range.
    """
    if preset not in presets:
        raise InputError(f"there is no preset {preset!r}: choose one of {', '.join(presets)}")
    return options(**{**presets[preset], **{name: value for name, value in given.items() if value is not None}})
