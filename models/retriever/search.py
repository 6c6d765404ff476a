"""Searches a retriever's dropout and weight decay by validation Recall@10 (paper, section 4.0.4)."""

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from models.checkpoint import Checkpoint
from models.device import torch_device
from models.retriever.fitting.loop import fit
from models.retriever.options import RetrieverTraining
from models.retriever.titles import Titles, encode_titles, training_inputs
from preprocessing.artifacts import write_whole
from preprocessing.data import Data, load_data
from preprocessing.errors import InputError

RESULTS = "trials.json"
STUDY = "study.log"
JUDGED_AFTER = 3
"""Number of trainings that run to their end before any may be pruned."""


class Range(NamedTuple):
    """A range of values to draw from, on a logarithmic scale if ``log``."""

    low: float
    high: float
    log: bool = False


Space = Mapping[str, tuple[float, ...] | Range]
"""Values of each searched option: a few values, of which all combinations are tried, or a range."""
SPACES: Mapping[str, Space] = {
    "paper": {"weight_decay": (0.0, 0.01), "dropout": (0.1, 0.2, 0.3, 0.4, 0.5)},
    "dropout": {"dropout": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)},
    "wide": {"weight_decay": Range(1e-4, 0.3, log=True), "dropout": Range(0.05, 0.7)},
}
"""Search spaces by name: ``paper`` is the paper's full grid, ``dropout`` varies the dropout alone, and ``wide`` has
ranges that a tree-structured Parzen estimator samples (Bergstra et al. 2011)."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """Options of a search."""

    training: RetrieverTraining
    """Options of every training apart from the searched ones. Its seed is also the sampler's."""
    space: str = "paper"
    """Name of the search space, a key of :data:`SPACES`."""
    budget: int = 10
    """Maximum number of trainings, including those before an interruption."""

    def __post_init__(self) -> None:
        if self.space not in SPACES:
            raise InputError(f"there is no space {self.space!r}: choose one of {', '.join(SPACES)}")
        if self.budget < 1:
            raise InputError(f"the budget must be at least 1 training, not {self.budget}")

    @property
    def grid(self) -> dict[str, tuple[float, ...]] | None:
        """Values of each option to combine; None if the space has a range."""
        grid = {name: values for name, values in SPACES[self.space].items() if not isinstance(values, Range)}
        return grid if len(grid) == len(SPACES[self.space]) else None

    @property
    def trainings(self) -> int:
        """Number of trainings: the budget, or the size of the grid if that is smaller."""
        return self.budget if self.grid is None else min(self.budget, math.prod(map(len, self.grid.values())))


def search(options: Search, artifacts: Path) -> dict[str, Any]:
    """Train up to ``options.budget`` times, and return the trainings' options and validation Recall@10, best first.

    A training is pruned at a validation where its best Recall@10 so far is below the median of the other trainings at
    the same step, but not before half of its patience. The search is stored in ``artifacts/tuning/<name>``. An
    interrupted search resumes from the last validation of the interrupted training, and the same options with a larger
    budget continue a finished one. Only one process may run a search at a time.

    Args:
        options: see :class:`Search`.
        artifacts: folder that holds ``data``.

    Returns:
        ``{"dataset", "model", "space", "folder", "best": {...}, "trials": [{"dropout", "weight_decay", "state",
        "validation_Recall@10", "best_step", "steps", "seconds"}, ..]}``, best first; also written as ``trials.json``.

    Raises:
        InputError: ``artifacts`` holds no preprocessed data, or the loss of a training is not finite.
    """
    options = replace(options, training=replace(options.training, device=torch_device(options.training.device)))
    data = load_data(artifacts)
    titles = encode_titles(options.training, data, artifacts)
    searched = asdict(replace(options, budget=1))  # a larger budget is the same search
    read = training_inputs(options.training, artifacts)
    settings = hashlib.sha256(json.dumps([searched, read], sort_keys=True).encode()).hexdigest()[:12]
    folder = artifacts / "tuning" / f"{options.training.model}-{options.space}-{settings}"
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(logging.ERROR)  # otherwise Ctrl-C prints a page of warnings
    study = _open(options, folder / STUDY)
    if (left := options.trainings - len(_ended(study))) > 0:
        study.optimize(lambda trial: _train(trial, options, data, titles, read, folder), n_trials=left)
    result = {
        "dataset": data.name,
        "model": options.training.model,
        "space": options.space,
        "folder": str(folder),
        **_results(study),
    }
    write_whole(folder / RESULTS, json.dumps(result, indent=1) + "\n")
    return result


def _open(options: Search, path: Path) -> optuna.Study:
    """Return the study, in which an interrupted training waits to be resumed."""
    training = options.training
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(path))),
        study_name=path.parent.name,
        load_if_exists=True,
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(
            n_startup_trials=JUDGED_AFTER, n_warmup_steps=training.validate_every * (training.patience // 2)
        ),
    )
    for trial in study.get_trials(states=[TrialState.RUNNING]):  # its process was killed
        study.tell(trial.number, state=TrialState.FAIL)
    trials = study.get_trials()
    continued = {trial.user_attrs.get("continues") for trial in trials}
    for trial in trials:
        if trial.state == TrialState.FAIL and trial.number not in continued:
            again = {name: getattr(trial, name) for name in ("params", "distributions", "intermediate_values")}
            # The grid sampler stores its position in the grid in the system attributes.
            study.add_trial(
                create_trial(
                    state=TrialState.WAITING,
                    user_attrs={"continues": trial.number},
                    system_attrs=trial.system_attrs,
                    **again,
                )
            )
    # A new seed whenever the search is continued, so that the first draws are not repeated.
    seed = training.seed + len(study.get_trials(deepcopy=False))
    study.sampler = (
        optuna.samplers.TPESampler(seed=seed)
        if options.grid is None
        else optuna.samplers.GridSampler(options.grid, seed)
    )
    return study


def _train(trial: Trial, options: Search, data: Data, titles: Titles, read: Mapping[str, str], folder: Path) -> float:
    """Run one training, and return its best validation Recall@10."""
    chosen: dict[str, Any] = {
        name: trial.suggest_float(name, values.low, values.high, log=values.log)
        if isinstance(values, Range)
        else trial.suggest_categorical(name, values)
        for name, values in SPACES[options.space].items()
    }
    training = replace(options.training, **chosen)
    name = "-".join(f"{key}-{value:g}" for key, value in chosen.items())
    checkpoint = Checkpoint(folder / f"{name}.pt", asdict(training), read)

    def watch(step: int, reached: float) -> None:
        trial.report(reached, step)
        if trial.should_prune():
            raise optuna.TrialPruned

    _, progress = fit(training, data, checkpoint, folder / "logs" / name, watch, titles.trained(data))
    checkpoint.remove()
    trial.set_user_attr("seconds", round(progress.seconds, 1))
    return progress.best


def _ended(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(states=[TrialState.COMPLETE, TrialState.PRUNED])


def _results(study: optuna.Study) -> dict[str, Any]:
    """Return every training that ended, best first; pruned ones come last, with the best value they had reached."""
    trials = []
    for trial in _ended(study):
        assert trial.datetime_start is not None
        assert trial.datetime_complete is not None
        reached = trial.intermediate_values
        best_step = max(reached, key=lambda step: (reached[step], -step))
        seconds = (trial.datetime_complete - trial.datetime_start).total_seconds()
        trials.append(
            {
                **trial.params,
                "state": trial.state.name.lower(),
                "validation_Recall@10": reached[best_step],
                "best_step": best_step,
                "steps": max(reached),
                "seconds": trial.user_attrs.get("seconds", round(seconds, 1)),
            }
        )
    trials.sort(key=lambda row: (row["state"] != "complete", -row["validation_Recall@10"]))
    return {"best": trials[0], "trials": trials}
