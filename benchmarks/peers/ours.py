"""Trains this project's SASRec; see :mod:`benchmarks.peers`."""

import shutil
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.peers.training import OPTIONS, Recorder, run
from models.checkpoint import Checkpoint
from models.retriever.architectures.build import build_model
from models.retriever.architectures.retriever import Retriever
from models.retriever.batches import training_windows
from models.retriever.fitting.loop import fit
from preprocessing.data import Data


class Stopped(Exception):  # noqa: N818 - no error: the training has ended
    """The recorder has stopped the training."""


def train(data: Data, folder: Path, recorder: Recorder) -> Retriever:
    """Train until the recorder stops it, and return the model of the best validation."""
    steps_an_epoch = -(-len(training_windows(data.training, OPTIONS.max_length)) // OPTIONS.batch_size)
    options = replace(OPTIONS, device="cpu", validate_every=steps_an_epoch, epochs=10_000, patience=10_000)
    checkpoint = Checkpoint(folder / "checkpoint.pt", asdict(options), {"data": data.fingerprint})
    kept = folder / "stopped.pt"

    def watch(step: int, reached: float) -> None:
        if step:
            recorder.validated(step // steps_an_epoch, reached)
        if recorder.stopped:
            shutil.copy(checkpoint.path, kept)  # `fit` removes the checkpoint of a training that `watch` ends
            raise Stopped

    with suppress(Stopped):
        fit(options, data, checkpoint, folder / "logs", watch)
    state = Checkpoint(kept, asdict(options), {"data": data.fingerprint}).load()
    assert state is not None
    model = build_model(options, data.catalogue.trained, None)
    model.load_state_dict(state["best"])
    return model


if __name__ == "__main__":
    run("ours", ("torch",), train)
