"""Tells a step that the next one is dead, so that its requests are refused at once.

Triton goes on to queue requests for a process that died, and fails one of them a second. Therefore the process of each
step holds the lock of a file for as long as it lives, in the folder that the steps of a release share, and the step
before it refuses requests while nobody holds one.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serving.contract import HANDED_ON_BY_RETRIEVER, PROBE, STEPS
from serving.steps.ranker_queue import hold, is_held, queue_folder, tidy
from serving.steps.step import Answer, Tensors

LOOK_SECONDS = 0.1
"""Time in seconds between two looks at the next step's files."""


class DeadError(Exception):
    """Every process of the step that the request would reach next is dead."""


def _dead(step: str) -> DeadError:
    return DeadError(
        f"step {step} is dead: `llamarec serve` restarts it within seconds, a bare tritonserver must be restarted"
    )


class DeadStep:
    """Refuses every request, instead of a step whose processes are dead.

    Args:
        step: its name.
    """

    def __init__(self, step: str) -> None:
        self._step = step

    def answer(self, request: Tensors) -> Answer:
        """Refuse a request.

        Raises:
            DeadError: always.
        """
        raise _dead(self._step)

    def facts(self, request: Tensors, answer: Answer, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return nothing, as nothing is ever answered."""
        return {}


class Presence:
    """Shows the other steps that this process lives, and sees whether one of the next step does.

    Args:
        folder: see :func:`serving.steps.ranker_queue.queue_folder`.
        step: name of this process's step.
    """

    def __init__(self, folder: Path, step: str) -> None:
        self._folder = folder
        self._next = (*STEPS[1:], None)[STEPS.index(step)]
        # An ensemble that ends with the retriever does not ask for the candidates, which the next step needs.
        self._needed = HANDED_ON_BY_RETRIEVER if step == "retriever" else None
        self._file = hold(folder, f"{step}.{os.getpid()}")
        self._looked = 0.0
        self._was_seen = self._is_dead = False

    def check(self, request: Any) -> None:
        """Check that a Triton request can be passed on.

        A next step that was never seen is not missed: it may be loaded later, or be none of this project's.

        Raises:
            DeadError: every process of the next step has ended.
        """
        if self._next is None or request.request_id() == PROBE:  # probes ask this step alone
            return
        if self._needed is not None and self._needed.isdisjoint(request.requested_output_names()):
            return
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            self._look(f"{self._next}.*")
        if self._is_dead:
            raise _dead(self._next)

    def close(self) -> None:
        """Let go of this process's file."""
        os.close(self._file)
        tidy(self._folder)

    def _look(self, files: str) -> None:
        alive = any(is_held(path) for path in self._folder.glob(files))
        self._was_seen = self._was_seen or alive
        self._is_dead = self._was_seen and not alive
        self._looked = time.monotonic()


def open_presence(step: str, arguments: Mapping[str, str]) -> Presence | None:
    """Return the presence of a step of an ensemble, from the arguments of Triton's ``initialize``; else None."""
    return Presence(queue_folder(arguments["model_name"].removeprefix(step)), step) if step in STEPS else None
