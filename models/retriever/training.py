"""The retriever's training stage: the first stage of LlamaRec (paper, sections 3.2 and 4.0.4)."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from llamarec_client.contract import MAX_CANDIDATES
from models.checkpoint import Checkpoint
from models.device import torch_device
from models.metrics import recall, summary
from models.retriever.batches import Items
from models.retriever.fitting.curves import plot_curve
from models.retriever.fitting.loop import TrainingProgress, Watch, fit, sent_histories
from models.retriever.fitting.start import earlier_state
from models.retriever.fitting.sums import PROJECTION, with_sums
from models.retriever.options import RetrieverTraining
from models.retriever.stage import RetrievalStage, pool_of
from models.retriever.titles import all_titles, encode_titles, training_inputs
from models.retriever.trained import (
    CONFIG,
    KIND,
    PROJECTION_FILE,
    SECOND,
    WEIGHTS,
    TrainedModel,
    TrainedRetriever,
)
from models.signals.fitting import count_statistics, fit_weights
from models.signals.signals import Signals
from models.titles.words import WordEncoder
from preprocessing.artifacts import is_finished, new_artifact, read_manifest
from preprocessing.catalogue import ITEMS_FILE
from preprocessing.data import Data, load_data
from preprocessing.errors import InputError

METRICS = "metrics.json"
CURVE = "curve.png"
CHECKPOINTS = ("retriever-checkpoint.pt", "second-retriever-checkpoint.pt")
LOGS = "logs"
FITTED_USERS = 10_000
"""Maximum number of validation users on whom the signals' weights are fitted."""


def train_retriever(
    options: RetrieverTraining, artifacts: Path, watch: Watch | None = None, start: Path | None = None
) -> dict[str, Any]:
    """Train a retriever, write ``artifacts/retriever`` with the weights of the best validation, and return the metrics.

    The folder holds the weights, the signals with their weights if there are any, ``candidates-validation.parquet`` and
    ``candidates-test.parquet`` (every user's top 20 and the rank of the true item among all items), ``metrics.json``
    and ``curve.png``. A folder made from the same options and data is left as it is; an interrupted training resumes
    from its last validation. Under ``accelerate launch`` all processes train together and the first one writes.

    Args:
        options: see :class:`RetrieverTraining`.
        artifacts: folder that holds ``data``, and ``titles`` for a training with a language model's title vectors.
        watch: function that is called with the step and Recall@10 of every validation of the first retriever. An
            exception in it ends the training, and nothing is written.
        start: artifact of an earlier retriever to go on from, such as ``artifacts/retriever`` itself. Its items are
            found by their raw ids; new items start from their titles.

    Returns:
        the metrics: ``{"validation": {...}, "test": {...}, "steps": n, ...}``; with signals, ``"model_alone"`` has the
        metrics of the first retriever without them.

    Raises:
        InputError: ``artifacts`` holds no preprocessed data, the catalogue's titles have no words in common, the
            checkpoint there belongs to another training, the loss is not finite, or ``start`` is not a retriever of
            the same architecture.
    """
    options = replace(options, device=torch_device(options.device))
    folder, inputs = artifacts / "retriever", training_inputs(options, artifacts)
    if start is not None:
        inputs["start"] = read_manifest(start, KIND, "llamarec train-retriever").fingerprint
    if is_finished(folder, KIND, options=asdict(options), inputs=inputs):
        return _metrics(folder)
    data = load_data(artifacts)
    if not data.users:
        raise InputError(f"{artifacts / 'data'} has no users to train on: run `llamarec preprocess` on more data")
    fitted: list[_Fitted] = []
    checkpoints: list[Checkpoint] = []
    for some, name in zip((options, *_second(options)), CHECKPOINTS, strict=False):
        checkpoint = Checkpoint(artifacts / name, asdict(some), inputs)
        logs = artifacts / LOGS / ("second-retriever" if fitted else "retriever")
        went_before = None if start is None else start / SECOND if fitted else start
        encoder = WordEncoder.load(went_before) if went_before is not None and some.titles == "words" else None
        titles = encode_titles(some, data, artifacts, encoder)
        state = None if went_before is None else earlier_state(went_before, some, data, titles)
        model, progress = fit(some, data, checkpoint, logs, None if fitted else watch, titles.trained(data), state)
        served = with_sums(model, some, data.catalogue.trained, titles.retrieved(some, data))
        fitted.append(_Fitted(served, progress, model.state_dict().get(PROJECTION), titles.encoder))
        checkpoints.append(checkpoint)
    processes = PartialState()
    if processes.is_main_process:
        _write(options, data, folder, fitted, inputs)
        for checkpoint in checkpoints:
            checkpoint.remove()
    processes.wait_for_everyone()
    return _metrics(folder)


@dataclass(frozen=True)
class _Fitted:
    """A trained model, how its training went, and how a title becomes a part of its items' vectors."""

    served: TrainedModel
    progress: TrainingProgress
    projection: Tensor | None
    encoder: WordEncoder | None


def _second(options: RetrieverTraining) -> list[RetrieverTraining]:
    return [] if options.second is None else [options.second_options()]


def _metrics(folder: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    return metrics


def _write(
    options: RetrieverTraining,
    data: Data,
    folder: Path,
    fitted: list[_Fitted],
    inputs: dict[str, str],
) -> None:
    models = [one.served for one in fitted]
    facts = {"dataset": data.name, "users": len(data.users), "items": models[0].items}
    with new_artifact(folder, KIND, options=asdict(options), inputs=inputs, facts=facts) as partial:
        signals = fit_signals(options, data, models, fitted[0].encoder) if options.signals else None
        for place, one in enumerate(fitted):
            _write_model(one, data, partial / SECOND if place else partial)
        if signals is not None:
            signals.save(partial)
        trained = TrainedRetriever(models, RetrievalStage(signals))
        progress = fitted[0].progress
        metrics: dict[str, Any] = {
            "steps": progress.step,
            "best_step": progress.best_step,
            "best_validation_Recall@10": progress.best,
            "seconds": round(sum(one.progress.seconds for one in fitted), 1),
            **_measure(options, data, trained, lambda split: partial / f"candidates-{split}.parquet"),
            "curve": progress.curve,
        }
        if signals is not None:
            metrics["weights"] = dict(signals.weights)
        (partial / METRICS).write_text(json.dumps(metrics, indent=1))
        plot_curve(progress.curve, f"{options.model} on {data.name}", partial / CURVE)


def _write_model(fitted: _Fitted, data: Data, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    data.catalogue.write(folder / ITEMS_FILE)  # a later training goes on from these items
    save_file(fitted.served.model.state_dict(), folder / WEIGHTS)
    config = {**asdict(fitted.served.options), "items": fitted.served.items}
    (folder / CONFIG).write_text(json.dumps(config, indent=1))
    if fitted.projection is not None:
        save_file({"projection": fitted.projection}, folder / PROJECTION_FILE)
    if fitted.encoder is not None:
        fitted.encoder.save(folder)


def _measure(
    options: RetrieverTraining, data: Data, trained: TrainedRetriever, path: Callable[[str], Path]
) -> dict[str, Any]:
    """Write every user's candidates, and return the metrics of both splits."""
    metrics: dict[str, Any] = {}
    alone: dict[str, Any] = {}
    for split, histories, truth in (
        ("validation", data.training, data.validation),
        ("test", data.test_histories(), data.test),
    ):
        sent = sent_histories(histories, options)
        ranks, first = trained.write_candidates(path(split), data.users, sent, truth, MAX_CANDIDATES)
        metrics[split], alone[split] = _summary(ranks), _summary(first)
    return {**metrics, "model_alone": alone} if options.signals else metrics


def _summary(ranks: NDArray[np.int32]) -> dict[str, float]:
    return {**summary(ranks), f"Recall@{MAX_CANDIDATES}": recall(ranks, MAX_CANDIDATES)}


def fit_signals(
    options: RetrieverTraining, data: Data, models: Sequence[TrainedModel], encoder: WordEncoder | None = None
) -> Signals:
    """Return the signals with weights fitted on validation users whose true item is in the pool.

    Statistics are counted in the training sequences alone, which do not contain the validation items. The pools have
    trained items only: an untrained one is no user's true item, and would make every signal that it lacks seem better.

    Args:
        options: options of the training, for the size of the pool and the seed of the users' choice.
        data: the data that the models were trained on.
        models: one or two retrievers.
        encoder: encoder of the titles by their words; by default, one is fitted.
    """
    statistics = count_statistics(data.training, all_titles(data), data.catalogue.trained, encoder)
    users = np.random.default_rng(options.seed).permutation(len(data.users))[:FITTED_USERS]
    histories: list[Items] = [data.training[user] for user in users]
    pools = TrainedRetriever(models, RetrievalStage())
    sources: list[NDArray[np.float64]] = []
    truths: list[int] = []
    for user, history, rows in zip(users, histories, pools.rows(histories), strict=True):
        trained = [row[: data.catalogue.trained + 1] for row in rows]
        items, logits = pool_of(trained, history, options.pool)
        found = np.flatnonzero(items == data.validation[user])
        if len(found):
            sources.append(np.concatenate((logits, statistics.signals(history, items)), axis=1))
            truths.append(int(found[0]))
    return Signals(statistics, fit_weights(sources, truths, len(models)), options.pool)
