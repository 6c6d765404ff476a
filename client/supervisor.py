"""`llamarec serve`: a tritonserver that is watched, and whose steps come back by themselves.

Triton does not restart a Python step whose process died: every request then takes a second and fails, while server and
model stay "ready". This process watches each step's process (ten times a second), asks each step by name (every
second), and has the server load a step again that is dead or hangs. An override with a changed parameter reloads that
model only; the other steps and requests to them go on.
"""

import json
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import FrameType
from typing import Any

from client.control import CONTROL_FILE, KEY_HEADER, RESTRICTED, Control, probe_request, repository_lock, step_of
from client.errors import ClientError, ServerError, ServerUnavailable
from client.process import ServerProcess, Stub, is_alive
from client.server import (
    PORTS,
    check_ports,
    has_option,
    option_value,
    server_command,
    server_environment,
    shared_memory_flag,
)

WATCH_SECONDS = 0.1
PROBE_SECONDS = 1.0
HANG_SECONDS = 30.0
"""A step that answers nothing for so long, though it is asked, is killed and loaded again."""
EXIT_SECONDS = 10
REVIVE = "REVIVE"
"""Parameter of a model's configuration that changes when it is to be loaded again."""
LONGEST_PAUSE = 30.0
"""Seconds between attempts to load a step that does not load."""


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


@dataclass
class Watch:
    """Watches the steps of one running server until :meth:`stop`.

    Args:
        server: its process.
        control: its HTTP endpoint.
        repository: of the lock that is shared with releases.
        hang_seconds: see :data:`HANG_SECONDS`.
    """

    server: ServerProcess
    control: Control
    repository: Path
    hang_seconds: float = HANG_SECONDS
    steps: dict[str, StepState] = field(default_factory=dict)
    models: set[str] = field(default_factory=set)
    _stubs: dict[int, Stub] = field(default_factory=dict)
    _stopped: threading.Event = field(default_factory=threading.Event)
    _healing: threading.Lock = field(default_factory=threading.Lock)
    """Held while it is decided whether a step is to be healed, so that it is once."""

    def stop(self) -> None:
        """No step is healed from now on."""
        self._stopped.set()

    def is_ready(self) -> bool:
        """Whether every loaded step answered its last probe and an ensemble is loaded."""
        states = list(self.steps.values())
        return bool(states) and all(state.alive for state in states) and len(self.models) > len(states)

    def refresh(self) -> None:
        """Looks which models are loaded, probes those that are new, and learns the processes of all."""
        self.models = self.control.ready_models()
        for model in [*self.steps]:
            if model not in self.models and not self.steps[model].healing:
                del self.steps[model]  # its prober ends
        for model in self.models:
            if step_of(model) and model not in self.steps:
                self.steps[model] = StepState()
                threading.Thread(target=self._probe_regularly, args=(model,), daemon=True).start()
        for stub in self.server.stubs():
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
            with suppress(ClientError), self._healing:
                if not state.healing and stub.model in self.control.ready_models() and self._missing(stub.model):
                    self._heal(stub.model, f"process {pid} of instance {stub.instance} died")

    def _missing(self, model: str) -> int:
        """How many of a model's processes are not there."""
        groups = self.control.config(model).get("instance_group", [])
        wanted = sum(int(group.get("count", 1)) * max(len(group.get("gpus", [])), 1) for group in groups)
        return wanted - sum(stub.model == model for stub in self.server.stubs())

    def _heal(self, model: str, reason: str) -> None:
        state = self.steps[model]
        state.alive, state.healing, state.reason = False, True, reason
        log("step lost", model=model, reason=reason)
        threading.Thread(target=self._revive, args=(model, state), daemon=True).start()

    def _revive(self, model: str, state: StepState) -> None:
        started, pause = time.monotonic(), 0.5
        replaced = [stub for stub in self.server.stubs() if stub.model == model]
        while not self._stopped.is_set():
            try:
                with repository_lock(self.repository, exclusive=False):
                    config = self.control.config(model)
                    config.setdefault("parameters", {})[REVIVE] = {"string_value": str(time.time_ns())}
                    self.control.load(model, config)
                break
            except ClientError as error:
                state.reason = f"does not load: {error}"
                log("step does not load", model=model, error=str(error), again_in=pause)
                self._stopped.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        for stub in self.server.stubs():
            self._stubs.setdefault(stub.pid, stub)
        state.revived += 1
        state.healing = False
        log("step is back", model=model, seconds=round(time.monotonic() - started, 3))
        # A request that died with its process can keep the model that was replaced, and its other instances, loaded.
        if not self._stopped.wait(self.hang_seconds):
            self._end(stub for stub in self.server.stubs() if stub in replaced)

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
            before = self.control.answers(model)
            try:
                self.control.infer(model, request, self.hang_seconds)
                answered = True
            except ServerUnavailable as error:
                # No answer yet: it may be busy with long requests before this one.
                answered, reason = self.control.answers(model) > before, str(error)
                if not answered:
                    self._replace(model, state, f"no answer for {self.hang_seconds:g} s")
        except ServerError as error:
            reason = str(error)
            if "is not healthy" in reason:
                self._replace(model, state, reason)
        except ServerUnavailable as error:  # the server itself is silent
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
            self._end(stub for stub in self.server.stubs() if stub.model == model)
            self._heal(model, reason)

    def _end(self, stubs: Iterable[Stub]) -> None:
        """Kills processes; their deaths are ours, and no reason to heal anything."""
        for stub in stubs:
            self._stubs.pop(stub.pid, None)
            with suppress(ProcessLookupError):
                os.kill(stub.pid, signal.SIGKILL)


class Supervisor:
    """Runs a server and its watch until a signal ends both.

    Args:
        repository: the model repository.
        arguments: further flags for tritonserver.
        load: models to load; all of the repository when not given.
        health_port: of the endpoint for orchestrators; none when not given.
        key: of the restricted APIs; a random one when not given.
        hang_seconds: see :data:`HANG_SECONDS`.
    """

    def __init__(
        self,
        repository: Path,
        arguments: Sequence[str] = (),
        *,
        load: Sequence[str] = ("*",),
        health_port: int | None = None,
        key: str | None = None,
        hang_seconds: float = HANG_SECONDS,
    ) -> None:
        for option in ("--model-control-mode", "--load-model", "--model-repository"):
            if has_option(arguments, option):
                raise ServerError(f"{option} is what `llamarec serve` sets itself: leave it out, or run tritonserver")
        if option_value(arguments, "--allow-http", "true").lower() in ("false", "0"):
            raise ServerError("`llamarec serve` watches over HTTP on the loopback interface: leave --allow-http out")
        self._repository = repository
        port = option_value(arguments, "--http-port", str(PORTS["http"]))
        self._control = Control(f"127.0.0.1:{port}", key or secrets.token_urlsafe(24))
        self._prefix = f"llamarec_{port}_{secrets.token_hex(4)}_"
        self._arguments = [
            f"--model-repository={repository}",
            "--model-control-mode=explicit",
            *(f"--load-model={model}" for model in load),
            "--strict-readiness=false",  # one model that failed to load would leave the server "not ready"
            *arguments,
            shared_memory_flag(self._prefix),
        ]
        restriction = f"{RESTRICTED}:{KEY_HEADER}={self._control.key}"
        defaults = {
            "--http-restricted-api": restriction,
            "--grpc-restricted-protocol": restriction,
            "--http-address": "127.0.0.1",
            "--exit-timeout-secs": str(EXIT_SECONDS),
        }
        self._arguments += [f"{name}={value}" for name, value in defaults.items() if not has_option(arguments, name)]
        self._exit_seconds = int(option_value(self._arguments, "--exit-timeout-secs", str(EXIT_SECONDS)))
        self._health_port = health_port
        self._hang_seconds = hang_seconds
        self._watch: Watch | None = None
        self._ending = threading.Event()

    def run(self) -> int:
        """Serves until SIGTERM or SIGINT; the server's exit code.

        A server that ends by itself after it was ready is started again.

        Raises:
            ServerError: no tritonserver is installed, or a port is taken.
        """
        check_ports(self._arguments)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        health = self._start_health() if self._health_port is not None else None
        with suppress(OSError):  # a repository that cannot be written gets no releases either
            self._control.write(self._repository)
        try:
            while True:
                code, was_ready = self._run_server()
                if self._ending.is_set() or not was_ready:
                    return code
                log("server ended", code=code)
                time.sleep(1)
        finally:
            (self._repository / CONTROL_FILE).unlink(missing_ok=True)
            if health:
                health.shutdown()

    def _run_server(self) -> tuple[int, bool]:
        """The exit code of one server, and whether it was ever ready."""
        server = ServerProcess(server_command(self._arguments), server_environment(), self._prefix)
        watch = self._watch = Watch(server, self._control, self._repository, self._hang_seconds)
        next_refresh, was_ready = 0.0, False
        try:
            while server.exit_code() is None and not self._ending.is_set():
                if time.monotonic() >= next_refresh:
                    with suppress(ClientError):  # not listening yet, or too busy to say
                        watch.refresh()
                    next_refresh = time.monotonic() + PROBE_SECONDS
                watch.look_for_deaths()
                if not was_ready and watch.is_ready():
                    was_ready = True
                    log("ready", models=sorted(watch.models))
                time.sleep(WATCH_SECONDS)
        finally:
            watch.stop()
            self._watch = None
            code = server.stop(self._exit_seconds + 5)
        return code, was_ready

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._ending.set()

    def health(self) -> dict[str, Any]:
        """What the health endpoint shows."""
        watch = self._watch
        steps = {} if watch is None else {name: vars(state) for name, state in sorted(watch.steps.items())}
        return {"ready": watch is not None and watch.is_ready() and not self._ending.is_set(), "steps": steps}

    def _start_health(self) -> ThreadingHTTPServer:
        supervisor = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                health = supervisor.health()
                if self.path == "/live":  # this process heals the rest, so nothing else calls for a restart
                    self._answer(200, "text/plain", "alive\n")
                elif self.path == "/ready":
                    self._answer(200 if health["ready"] else 503, "application/json", json.dumps(health) + "\n")
                elif self.path == "/metrics":
                    self._answer(200, "text/plain; version=0.0.4", health_metrics(health))
                else:
                    self._answer(404, "text/plain", "/live, /ready or /metrics\n")

            def _answer(self, status: int, kind: str, text: str) -> None:
                content = text.encode()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
                """A line for every probe is nobody's interest."""

        assert self._health_port is not None, "asked for"
        try:
            server = ThreadingHTTPServer(("", self._health_port), Handler)
        except (OSError, OverflowError) as error:
            raise ServerError(f"--health-port {self._health_port} cannot be used: {error}") from None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server


def health_metrics(health: dict[str, Any]) -> str:
    """The health endpoint's own Prometheus metrics: only this process knows them."""
    lines = ["# TYPE llamarec_ready gauge", f"llamarec_ready {int(health['ready'])}"]
    lines.append("# TYPE llamarec_step_up gauge")
    lines += [f'llamarec_step_up{{model="{name}"}} {int(step["alive"])}' for name, step in health["steps"].items()]
    lines.append("# TYPE llamarec_step_revived_total counter")
    lines += [
        f'llamarec_step_revived_total{{model="{name}"}} {step["revived"]}' for name, step in health["steps"].items()
    ]
    return "\n".join(lines) + "\n"
