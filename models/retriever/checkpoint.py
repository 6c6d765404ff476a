"""What an interrupted training goes on from."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from models.retriever.options import RetrieverTraining
from preprocessing.errors import InputError


class Checkpoint:
    """A file that is tied to the options and the data set of its training.

    Args:
        path: of the file.
        options: of the training.
        data: fingerprint of the data set.
    """

    def __init__(self, path: Path, options: RetrieverTraining, data: str) -> None:
        self.path = path
        self._options = asdict(options)
        self._data = data

    def save(self, state: dict[str, Any]) -> None:
        """Writes the state of a training, aside and renamed."""
        partial = self.path.with_name(f".{self.path.name}.partial")
        made_by = json.dumps({"options": self._options, "data": self._data})
        torch.save({"made_by": made_by, **state}, partial)
        os.replace(partial, self.path)

    def load(self) -> dict[str, Any] | None:
        """The saved state, or None where there is none.

        Raises:
            InputError: the file is damaged, or of another training.
        """
        if not self.path.exists():
            return None
        remedy = f"finish that training with its own options, or delete {self.path}"
        try:
            state: dict[str, Any] = torch.load(self.path, weights_only=True)
            made_by = json.loads(state.pop("made_by"))
        except Exception as error:
            raise InputError(f"{self.path} cannot be read as a checkpoint: delete it ({error})") from None
        if made_by["data"] != self._data:
            raise InputError(f"{self.path} is the checkpoint of a training on another data set: {remedy}")
        for name, value in self._options.items():
            found = made_by["options"].get(name)
            if found != value:
                raise InputError(f"{self.path} is of a training with {name} {found}, not {value}: {remedy}")
        return state

    def remove(self) -> None:
        """Deletes the file; a training that has ended needs it no more."""
        self.path.unlink(missing_ok=True)
