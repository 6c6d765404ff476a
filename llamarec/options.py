"""Options that several commands share, and a stage's options from what the command line was given."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from preprocessing.errors import InputError

Artifacts = Annotated[Path, typer.Option(help="Folder of the data set's artifacts; each stage writes a subfolder.")]
Repository = Annotated[Path, typer.Option(help="The Triton model repository.")]
Releases = Annotated[Path, typer.Option(help="The repository of releases; `llamarec serve --repository` serves it.")]
Server = Annotated[
    str,
    typer.Option(
        help="HOST:PORT of the server's gRPC endpoint. Several servers: separated by commas, or `dns:///NAME:PORT` for"
        " all addresses of a name."
    ),
]
Store = Annotated[
    str,
    typer.Option(
        envvar="LLAMAREC_STORE",
        help="Address of the store of histories: `sqlite:///FILE`, `redis://HOST:PORT/DATABASE` or `rediss://...`.",
    ),
]
Delimiter = Annotated[
    str | None, typer.Option(help="Separator in text files: `;`, `tab`. Default: a tab for .tsv, else a comma.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output instead of a table.")]
Preset = Annotated[
    str, typer.Option(help="Named options: `default`, `demo` (minutes on two cores) or one of the paper's.")
]
Model = Annotated[
    str | None,
    typer.Option(help="`lrurec` (the paper's retriever), `sasrec`, `bert4rec` or `narm`. Overrides the preset."),
]
Loss = Annotated[
    str | None,
    typer.Option(help="`softmax` over all items, or `binary`, SASRec's own. Default: the model's."),
]
Epochs = Annotated[int | None, typer.Option(help="Maximum number of epochs. Overrides the preset.")]
ValidateEvery = Annotated[int | None, typer.Option(help="Steps between two validations.")]
Patience = Annotated[int | None, typer.Option(help="Validations without a better Recall@10 before training stops.")]
Seed = Annotated[int | None, typer.Option(help="Random seed.")]
Device = Annotated[
    str | None, typer.Option(help="`auto` (the first GPU if there is one), `cpu`, `gpu` or `gpu:N`. Default: `auto`.")
]
DEFAULT_ARTIFACTS = Path("artifacts/movielens-100k")
DEFAULT_REPOSITORY = Path("model_repository")
DEFAULT_RELEASES = Path("releases")
DEFAULT_SERVER = "127.0.0.1:8001"
Options = TypeVar("Options")


def encode_id(noun: str, given: str) -> bytes:
    """Return an id from the command line as bytes.

    Raises:
        InputError: it is not valid Unicode.
    """
    try:
        return given.encode()
    except UnicodeEncodeError:
        raise InputError(f"the {noun} {given!r} is not valid Unicode: check the terminal's encoding") from None


def addresses(text: str) -> list[str]:
    """Return the servers of an option that takes several, separated by commas."""
    return [address.strip() for address in text.split(",")]


def from_given(
    options: type[Options], given: Mapping[str, object], defaults: Mapping[str, Any] | None = None
) -> Options:
    """Build a stage's options from a command's parameters.

    Args:
        options: the stage's dataclass; parameters with the names of its fields are taken.
        given: the command's parameters by name; None stands for "not given".
        defaults: what applies where nothing is given, a preset for example.

    Raises:
        InputError: a value is out of range.
    """
    names = {field.name for field in fields(options)}  # type: ignore[arg-type]  # a dataclass, which TypeVar cannot say
    chosen = {name: value for name, value in given.items() if name in names and value is not None}
    return options(**{**(defaults or {}), **chosen})


def from_preset(
    options: type[Options], presets: Mapping[str, Mapping[str, Any]], preset: str, given: Mapping[str, object]
) -> Options:
    """Build a stage's options from its defaults, then the preset, then every given value that is not None.

    Raises:
        InputError: there is no such preset, or a value is out of range.
    """
    if preset not in presets:
        raise InputError(f"there is no preset {preset!r}: choose one of {', '.join(presets)}")
    return from_given(options, given, presets[preset])
