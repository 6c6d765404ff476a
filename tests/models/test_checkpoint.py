"""The checkpoint of both trainings: it belongs to one training, and it is data and not a program."""

from pathlib import Path

import pytest
import torch

from models.checkpoint import Checkpoint
from preprocessing.errors import InputError


def checkpoint(folder: Path, options: dict[str, object] | None = None, data: str = "these") -> Checkpoint:
    return Checkpoint(folder / "checkpoint.pt", options or {"seed": 1, "targets": ("q", "v")}, {"data": data})


def test_the_state_comes_back(tmp_path: Path):
    """Tensors and numbers are loaded as saved; tuples in the options compare equal although JSON makes them lists."""
    assert checkpoint(tmp_path).load() is None
    checkpoint(tmp_path).save({"step": 2, "weights": torch.arange(3)})
    state = checkpoint(tmp_path).load()
    assert state is not None
    assert state["step"] == 2
    assert state["weights"].tolist() == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"options": {"seed": 2, "targets": ("q", "v")}}, "belongs to a training with seed 1, not 2"),
        ({"data": "others"}, "is the checkpoint of a training on another data set"),
    ],
)
def test_another_training_refuses_it(tmp_path: Path, other, message: str):
    """Resuming it would mix two trainings, so the error names the difference and the remedy."""
    checkpoint(tmp_path).save({"step": 2})
    with pytest.raises(InputError, match=f"{message}.*finish that training with its own options, or delete"):
        checkpoint(tmp_path, **other).load()


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path):
    """Checkpoints of earlier versions do not name a format."""
    torch.save({"made_by": '{"options": {}, "data": "these"}', "step": 2}, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="was written by another version: delete it"):
        checkpoint(tmp_path, {"seed": 1}).load()


def test_a_checkpoint_is_data_and_not_a_program(tmp_path: Path):
    """A pickle that would run code on loading is refused: checkpoints are loaded with weights_only."""

    class Program:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"made_by": "{}", "progress": Program()}, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="cannot be read as a checkpoint: delete it"):
        checkpoint(tmp_path).load()
    assert not (tmp_path / "ran").exists()
