"""The checkpoint file from which an interrupted training resumes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preprocessing.artifacts import plain, replacing
from preprocessing.errors import InputError

FORMAT = 4


class Checkpoint:
    """A checkpoint file that is tied to the options and the inputs of its training.

    Args:
        path: the file.
        options: options of the training, anything that JSON can hold.
        inputs: fingerprint of each artifact that the training reads, by name.
    """

    def __init__(self, path: Path, options: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
        self.path = path
        self._options = plain(options)
        self._inputs = dict(inputs)

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the state of the training and replace the older checkpoint in one step.

        Args:
            state: tensors, numbers, strings and containers of them, since it is loaded with ``weights_only``.
        """
        import torch  # not for a stage that is finished

        with replacing(self.path) as partial:
            made_by = {"format": FORMAT, "options": self._options, **self._inputs}
            torch.save({"made_by": json.dumps(made_by), **state}, partial)

    def load(self) -> dict[str, Any] | None:
        """Return the saved state on the CPU, or None when there is no checkpoint.

        Raises:
            InputError: the file is damaged, or belongs to another training.
        """
        if not self.path.exists():
            return None
        import torch

        remedy = f"finish that training with its own options, or delete {self.path}"
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
            made_by = json.loads(state.pop("made_by"))
        except Exception as error:
            raise InputError(f"{self.path} cannot be read as a checkpoint: delete it ({error})") from None
        if made_by.get("format") != FORMAT:
            raise InputError(f"{self.path} was written by another version: delete it, and the training starts again")
        for name, fingerprint in self._inputs.items():
            if made_by.get(name) != fingerprint:
                what = "data set" if name == "data" else name
                raise InputError(f"{self.path} is the checkpoint of a training on another {what}: {remedy}")
        for name, value in self._options.items():
            found = made_by["options"].get(name)
            if found != value:
                raise InputError(f"{self.path} belongs to a training with {name} {found}, not {value}: {remedy}")
        return state

    def remove(self) -> None:
        """Delete the file; a finished training no longer needs it."""
        self.path.unlink(missing_ok=True)
