"""Watches the steps of a running server, and has the server load a step again that died or hangs.

Triton does not restart a Python step whose process died: every request then takes a second and fails, while server and
model stay "ready". A :class:`Watch` looks at each step's process (ten times a second) and asks each step by name (once
a second). A configuration override with a changed parameter reloads that model only; the other steps, and requests to
them, go on.
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

from serving.errors import ServerFailure, ServerUnreachable, ServingError
from serving.server.control import Control, probe_request, repository_lock, step_of
from serving.server.process import ServerProcess, Stub, is_alive

WATCH_SECONDS = 0.1
PROBE_SECONDS = 1.0
HANG_SECONDS = 30.0
"""A step that answers nothing for this long, although it is asked, is killed and loaded again."""
REVIVE = "REVIVE"
"""Parameter of a model's configuration that is changed to have the model loaded again."""
LONGEST_PAUSE = 30.0
"""Maximum time in seconds between attempts to load a step that does not load."""


def log(event: str, **facts: Any) -> None:
    """One line of JSON on standard error."""
    sys.stderr.write(json.dumps({"time": round(time.time(), 3), "event": event, **facts}) + "\n")
    sys.stderr.flush()


@dataclass
class StepState:
    """What is known of one loaded step."""

    alive: bool = False
    """Its last probe was answered, and as many of its processes live as its configuration wants."""
    healing: bool = False
    revived: int = 0
    """How often it was loaded again."""
    reason: str = "not asked yet"


class Watch:
    """Watches the steps of one running server until :meth:`stop`.

    Args:
        server: its process.
        control: its HTTP endpoint.
        repository: holds the lock that is shared with releases.
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
        """Held while it is decided whether a step is to be healed, so that it is healed once."""

    def stop(self) -> None:
        """No step is healed from now on."""
        self._stopped.set()

    def is_ready(self) -> bool:
        """Whether every loaded step answered its last probe and an ensemble is loaded."""
        states = list(self.steps.values())
        return bool(states) and all(state.alive for state in states) and len(self.models) > len(states)

    def refresh(self) -> None:
        """Looks which models are loaded, probes those that are new, and learns the processes of all."""
        self.models = self._control.ready_models()
        for model in [*self.steps]:
            if model not in self.models and not self.steps[model].healing:
                del self.steps[model]  # its prober ends
        for model in self.models:
            if step_of(model) and model not in self.steps:
                self.steps[model] = StepState()
                threading.Thread(target=self._probe_regularly, args=(model,), daemon=True).start()
        for stub in self._server.stubs():
            self._stubs.setdefault(stub.pid, stub)

    def look_for_deaths(self) -> None:
        """Heals every step that has lost a process."""
        for pid in [pid for pid in [*self._stubs] if not is_alive(pid)]:
            stub = self._stubs.pop(pid, None)
            if stub is None:
                continue
            state = self.steps.get(stub.model)
            if state is None or state.healing:
                continue  # unloaded, or replaced by our own doing
            with suppress(ServingError), self._healing:
                if not state.healing and stub.model in self._control.ready_models() and self._missing(stub.model):
                    self._heal(stub.model, f"process {pid} of instance {stub.instance} died")

    def _missing(self, model: str) -> int:
        """How many of a model's processes are not there."""
        groups = self._control.config(model).get("instance_group", [])
        wanted = sum(int(group.get("count", 1)) * max(len(group.get("gpus", [])), 1) for group in groups)
        return wanted - sum(stub.model == model for stub in self._server.stubs())

    def _heal(self, model: str, reason: str) -> None:
        state = self.steps[model]
        state.alive, state.healing, state.reason = False, True, reason
        log("step lost", model=model, reason=reason)
        threading.Thread(target=self._revive, args=(model, state), daemon=True).start()

    def _revive(self, model: str, state: StepState) -> None:
        started, pause = time.monotonic(), 0.5
        replaced = [stub for stub in self._server.stubs() if stub.model == model]
        while not self._stopped.is_set():
            try:
                with repository_lock(self._repository, exclusive=False):
                    config = self._control.config(model)
                    config.setdefault("parameters", {})[REVIVE] = {"string_value": str(time.time_ns())}
                    self._control.load(model, config)
                break
            except ServingError as error:
                state.reason = f"does not load: {error}"
                log("step does not load", model=model, error=str(error), again_in=pause)
                self._stopped.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        for stub in self._server.stubs():
            self._stubs.setdefault(stub.pid, stub)
        state.revived += 1
        state.healing = False
        log("step is back", model=model, seconds=round(time.monotonic() - started, 3))
        # A request that died with its process can keep the model that was replaced, and its other instances, loaded.
        if not self._stopped.wait(self._hang_seconds):
            self._end(stub for stub in self._server.stubs() if stub in replaced)

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
                # No answer yet: it may be busy with long requests before this one.
                answered, reason = self._control.answers(model) > before, str(error)
                if not answered:
                    self._replace(model, state, f"no answer for {self._hang_seconds:g} s")
        except ServerFailure as error:
            reason = str(error)
            if "is not healthy" in reason:
                self._replace(model, state, reason)
        except ServerUnreachable as error:  # the server itself is silent
            reason = str(error)
        if state.revived == revived and not state.healing:
            if answered and not state.alive:
                log("step answers", model=model)
            state.alive, state.reason = answered, reason

    def _replace(self, model: str, state: StepState, reason: str) -> None:
        """Kills what is left of a step that lives without answering, and has it loaded again."""
        with self._healing:
            if state.healing or self._stopped.is_set():
                return
            self._end(stub for stub in self._server.stubs() if stub.model == model)
            self._heal(model, reason)

    def _end(self, stubs: Iterable[Stub]) -> None:
        """Kills processes; their deaths are ours, and no reason to heal anything."""
        for stub in stubs:
            self._stubs.pop(stub.pid, None)
            with suppress(ProcessLookupError):
                os.kill(stub.pid, signal.SIGKILL)
