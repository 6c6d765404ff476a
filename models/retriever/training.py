"""The retriever's training stage: the first stage of LlamaRec (paper, sections 3.2 and 4.0.4)."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors.torch import load_file, save_file

from llamarec_client.contract import MAX_CANDIDATES
from models.checkpoint import Checkpoint
from models.device import torch_device
from models.metrics import recall, summary
from models.retriever.architectures.build import build_model
from models.retriever.architectures.retriever import Retriever
from models.retriever.fitting.curves import plot_curve
from models.retriever.fitting.loop import TrainingProgress, Watch, fit, sent_histories
from models.retriever.options import RetrieverTraining
from models.retriever.ranking import write_candidates
from preprocessing.artifacts import is_finished, new_artifact, read_manifest
from preprocessing.data import Data, load_data
from preprocessing.errors import InputError

KIND = "retriever"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
METRICS = "metrics.json"
CURVE = "curve.png"
CHECKPOINT = "retriever-checkpoint.pt"
LOGS = "logs"


def train_retriever(options: RetrieverTraining, artifacts: Path, watch: Watch | None = None) -> dict[str, Any]:
    """Train a retriever, write ``artifacts/retriever`` with the weights of the best validation, and return the metrics.

    The folder holds the weights, ``candidates-validation.parquet`` and ``candidates-test.parquet`` (every user's top 20
    and the rank of the true item among all items), ``metrics.json`` and ``curve.png``. A folder made from the same
    options and data is left as it is; an interrupted training resumes from its last validation. Under
    ``accelerate launch`` all processes train together and the first one writes.

    Args:
        options: see :class:`RetrieverTraining`.
        artifacts: folder that holds ``data``.
        watch: function that is called with the step and Recall@10 of every validation. An exception in it ends the
            training, and nothing is written.

    Returns:
        the metrics: ``{"validation": {...}, "test": {...}, "steps": n, ...}``.

    Raises:
        InputError: ``artifacts`` holds no preprocessed data, the checkpoint there belongs to another training, or the
            loss is not finite.
    """
    options = replace(options, device=torch_device(options.device))
    data_manifest = read_manifest(artifacts / "data", "data", "llamarec preprocess")
    folder, inputs = artifacts / "retriever", {"data": data_manifest.fingerprint}
    if is_finished(folder, KIND, options=asdict(options), inputs=inputs):
        return _metrics(folder)
    data = load_data(artifacts)
    if not data.users:
        raise InputError(f"{artifacts / 'data'} has no users to train on: run `llamarec preprocess` on more data")
    checkpoint = Checkpoint(artifacts / CHECKPOINT, asdict(options), inputs)
    model, progress = fit(options, data, checkpoint, artifacts / LOGS / "retriever", watch)
    processes = PartialState()
    if processes.is_main_process:
        _write(options, data, folder, model, progress, inputs)
        checkpoint.remove()
    processes.wait_for_everyone()
    return _metrics(folder)


def _metrics(folder: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    return metrics


def _write(
    options: RetrieverTraining,
    data: Data,
    folder: Path,
    model: Retriever,
    progress: TrainingProgress,
    inputs: dict[str, str],
) -> None:
    metrics: dict[str, Any] = {
        "steps": progress.step,
        "best_step": progress.best_step,
        "best_validation_Recall@10": progress.best,
        "seconds": round(progress.seconds, 1),
    }
    facts = {"dataset": data.name, "users": len(data.users), "items": data.catalogue.trained}
    with new_artifact(folder, KIND, options=asdict(options), inputs=inputs, facts=facts) as partial:
        save_file(model.state_dict(), partial / WEIGHTS)
        (partial / CONFIG).write_text(json.dumps({**asdict(options), "items": data.catalogue.trained}, indent=1))
        for split, histories, truth in (
            ("validation", data.training, data.validation),
            ("test", data.test_histories(), data.test),
        ):
            path = partial / f"candidates-{split}.parquet"
            sent = sent_histories(histories, options)
            ranks = write_candidates(path, model, options.max_length, data.users, sent, truth)
            metrics[split] = {**summary(ranks), f"Recall@{MAX_CANDIDATES}": recall(ranks, MAX_CANDIDATES)}
        metrics["curve"] = progress.curve
        (partial / METRICS).write_text(json.dumps(metrics, indent=1))
        plot_curve(progress.curve, f"{options.model} on {data.name}", partial / CURVE)


def load_retriever(folder: Path) -> tuple[Retriever, RetrieverTraining]:
    """Return the trained model, in evaluation mode on the CPU, and the options that it was trained with.

    Raises:
        InputError: ``folder`` is not a finished retriever.
    """
    read_manifest(folder, KIND, "llamarec train-retriever")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    items = config.pop("items")
    options = RetrieverTraining(**config)
    model = build_model(options, items)
    model.load_state_dict(load_file(folder / WEIGHTS))
    return model.eval(), options
