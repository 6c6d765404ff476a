"""Watches the steps of a running server, and revives a step that died or hangs by reloading its model.

Triton does not restart a Python step whose process died: every request to it then takes a second and fails, while
server and model stay "ready". A :class:`Watch` checks the processes of every step ten times a second, and sends each
step a probe once a second. Loading a model with a changed parameter in its configuration reloads only that model; other
steps and the requests to them continue. Until a step without any process is loaded, a stand-in refuses its requests
(:mod:`serving.server.stand_in`).
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.contract import RELEASE_STEPS
from serving.errors import ServerFailure, ServerUnreachable, ServingError
from serving.server.control import Control, probe_request, repository_lock, step_of
from serving.server.process import ServerProcess, Stub, is_alive
from serving.server.stand_in import of_model, with_stand_in, without_stand_in

WATCH_SECONDS = 0.1
PROBE_SECONDS = 1.0
HANG_SECONDS = 30.0
"""Time in seconds without any answer after which a step is killed and reloaded."""
REVIVE = "REVIVE"
"""Parameter of a model's configuration; a new value makes Triton reload the model."""
LONGEST_PAUSE = 30.0
"""Maximum time in seconds between two attempts to load a step."""


def log(event: str, **facts: Any) -> None:
    """Write one line of JSON to standard error."""
    sys.stderr.write(json.dumps({"time": round(time.time(), 3), "event": event, **facts}) + "\n")
    sys.stderr.flush()


@dataclass
class StepState:
    """Health of one loaded step."""

    alive: bool = False
    """Whether its last probe was answered and no process was found missing since."""
    healing: bool = False
    revived: int = 0
    """Number of times that it was reloaded."""
    reason: str = "not probed yet"


class Watch:
    """Watches the steps of one running server until :meth:`stop` is called.

    Args:
        server: process of the server.
        control: HTTP endpoint of the server.
        repository: the model repository, whose lock is shared with releases.
        hang_seconds: see :data:`HANG_SECONDS`.
    """

    def __init__(
        self, server: ServerProcess, control: Control, repository: Path, hang_seconds: float = HANG_SECONDS
    ) -> None:
        self.steps: dict[str, StepState] = {}
        """State of each loaded step, by the name of its model."""
        self.models: set[str] = set()
        """Names of the loaded models, ensembles included."""
        self._server = server
        self._control = control
        self._repository = repository
        self._hang_seconds = hang_seconds
        self._stubs: dict[int, Stub] = {}
        self._stopped = threading.Event()
        self._healing = threading.Lock()
        """Held while deciding whether to revive a step, so that it is revived only once."""

    def stop(self) -> None:
        """Stop probing and reviving steps."""
        self._stopped.set()

    def is_ready(self) -> bool:
        """Return whether every loaded step answered its last probe and an ensemble is loaded."""
        states = list(self.steps.values())
        return bool(states) and all(state.alive for state in states) and len(self.models) > len(states)

    def refresh(self) -> None:
        """Update the loaded models, start to probe new steps, and record the processes of all steps."""
        self.models = self._control.ready_models()
        for model in [*self.steps]:
            if model not in self.models and not self.steps[model].healing:
                del self.steps[model]  # its probing thread ends
        for model in self.models:
            if step_of(model) and model not in self.steps:
                self.steps[model] = StepState()
                threading.Thread(target=self._probe_regularly, args=(model,), daemon=True).start()
        for stub in self._server.stubs():
            self._stubs.setdefault(stub.pid, stub)

    def look_for_deaths(self) -> None:
        """Revive every step that has lost a process."""
        for pid in [pid for pid in [*self._stubs] if not is_alive(pid)]:
            stub = self._stubs.pop(pid, None)
            if stub is None:
                continue
            state = self.steps.get(stub.model)
            if state is None or state.healing:
                continue  # unloaded, or being reloaded already
            try:
                with self._healing:
                    if not state.healing and stub.model in self._control.ready_models() and self._missing(stub.model):
                        self._heal(stub.model, f"process {pid} of instance {stub.instance} died")
            except ServingError:  # the server is too busy to answer: look at this process again
                self._stubs.setdefault(pid, stub)

    def _missing(self, model: str) -> int:
        """Return the number of a model's processes that are missing."""
        groups = without_stand_in(self._control.config(model))["instance_group"]
        wanted = sum(int(group.get("count", 1)) * max(len(group.get("gpus", [])), 1) for group in groups)
        return wanted - len(of_model(self._server.stubs(), model))

    def _heal(self, model: str, reason: str) -> None:
        state = self.steps[model]
        state.alive, state.healing, state.reason = False, True, reason
        log("step lost", model=model, reason=reason)
        threading.Thread(target=self._revive, args=(model, state), daemon=True).start()

    def _revive(self, model: str, state: StepState) -> None:
        started, pause = time.monotonic(), 0.5
        is_loaded = self._refuse_waiting(model)
        replaced = [] if is_loaded else [stub for stub in self._server.stubs() if stub.model == model]
        while not self._stopped.is_set():
            try:
                with repository_lock(self._repository, exclusive=False):
                    config = without_stand_in(self._control.config(model))
                    if not is_loaded:
                        config.setdefault("parameters", {})[REVIVE] = {"string_value": str(time.time_ns())}
                    self._control.load(model, config)
                break
            except ServingError as error:
                if self._is_unloaded(model):
                    del self.steps[model]  # its probing thread ends
                    log("step unloaded", model=model)
                    return
                state.reason = f"does not load: {error}"
                log("step does not load", model=model, error=str(error), again_in=pause)
                self._stopped.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        else:
            return  # stopped before the server loaded it
        for stub in self._server.stubs():
            self._stubs.setdefault(stub.pid, stub)
        state.revived += 1
        state.healing = False
        log("step is back", model=model, seconds=round(time.monotonic() - started, 3))
        # A request that died with its process can keep the replaced model loaded: kill its remaining instances.
        if not self._stopped.wait(self._hang_seconds):
            self._end(stub for stub in self._server.stubs() if stub in replaced)

    def _refuse_waiting(self, model: str) -> bool:
        """Have a stand-in refuse the requests to a step that has no process; return whether that loaded the step too.

        Triton loads the whole model if its files have changed.
        """
        if step_of(model) not in RELEASE_STEPS or of_model(self._server.stubs(), model):
            return False
        try:
            with repository_lock(self._repository, exclusive=False):
                self._control.load(model, with_stand_in(self._control.config(model)))
        except ServingError as error:
            log("no stand-in", model=model, error=str(error))
            return False
        return bool(of_model(self._server.stubs(), model))

    def _is_unloaded(self, model: str) -> bool:
        """Return whether somebody unloaded a model; one that cannot be reloaded stays loaded, as it was."""
        try:
            return model not in self._control.ready_models()
        except ServingError:
            return False

    def _probe_regularly(self, model: str) -> None:
        step = step_of(model)
        assert step is not None, "only steps are probed"
        request, state = probe_request(step), self.steps[model]
        while not self._stopped.is_set() and self.steps.get(model) is state:
            if not state.healing:
                self._probe(model, request, state)
            self._stopped.wait(PROBE_SECONDS if state.alive else WATCH_SECONDS)

    def _probe(self, model: str, request: dict[str, Any], state: StepState) -> None:
        revived = state.revived
        answered, reason = False, ""
        try:
            before = self._control.answers(model)
            try:
                self._control.infer(model, request, self._hang_seconds)
                answered = True
            except ServerUnreachable as error:
                # The step may be busy with long requests before the probe; if so, it answered some of them.
                answered, reason = self._control.answers(model) > before, str(error)
                if not answered:
                    self._replace(model, state, f"no answer for {self._hang_seconds:g} s")
        except ServerFailure as error:
            reason = str(error)
            if "is not healthy" in reason:
                self._replace(model, state, reason)
        except ServerUnreachable as error:  # the server itself does not answer
            reason = str(error)
        if state.revived == revived and not state.healing:
            if answered and not state.alive:
                log("step answers", model=model)
            state.alive, state.reason = answered, reason

    def _replace(self, model: str, state: StepState, reason: str) -> None:
        """Kill the remaining processes of a step that does not answer, and reload it."""
        with self._healing:
            if state.healing or self._stopped.is_set():
                return
            self._end(stub for stub in self._server.stubs() if stub.model == model)
            self._heal(model, reason)

    def _end(self, stubs: Iterable[Stub]) -> None:
        """Kill processes and stop tracking them, so that their deaths do not trigger a reload."""
        for stub in stubs:
            self._stubs.pop(stub.pid, None)
            with suppress(ProcessLookupError):
                os.kill(stub.pid, signal.SIGKILL)
