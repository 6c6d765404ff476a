"""Options of a stage from a named preset and what the command line changed of it."""

from collections.abc import Mapping
from typing import Any, TypeVar

from preprocessing.errors import InputError

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
