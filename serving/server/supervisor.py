"""Runs `llamarec serve`: a tritonserver whose steps are watched and revived (:mod:`serving.server.watch`)."""

import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from serving.admin_key import DIGEST_VARIABLE, digest
from serving.errors import ServerFailure, ServingError
from serving.server.control import CONTROL_FILE, KEY_HEADER, RESTRICTED, Control
from serving.server.health import Health, HealthEndpoint
from serving.server.process import ServerProcess
from serving.server.programs import (
    PORTS,
    check_ports,
    has_option,
    number_option,
    option_value,
    served_path,
    server_command,
    server_environment,
    shared_memory_flag,
)
from serving.server.stand_in import compile_models
from serving.server.watch import HANG_SECONDS, PROBE_SECONDS, WATCH_SECONDS, Watch, log

EXIT_SECONDS = 10
"""Maximum time in seconds for the server to finish its requests in flight before it exits."""


class Supervisor:
    """A tritonserver and its watch, which run until a signal stops both.

    Args:
        repository: the model repository.
        arguments: additional flags for tritonserver.
        load: returns the models to load whenever a server starts, because releases are promoted meanwhile. Default: all
            models of the repository.
        health_port: port of the endpoint for orchestrators. Default: no endpoint.
        key: key of the restricted APIs and of ``items``. Default: a random key.
        hang_seconds: see :data:`serving.server.watch.HANG_SECONDS`.

    Raises:
        ServerFailure: ``arguments`` has a flag that `llamarec serve` sets itself.
    """

    def __init__(
        self,
        repository: Path,
        arguments: Sequence[str] = (),
        *,
        load: Callable[[], Sequence[str]] = lambda: ("*",),
        health_port: int | None = None,
        key: str | None = None,
        hang_seconds: float = HANG_SECONDS,
    ) -> None:
        for option in ("--model-control-mode", "--load-model", "--model-repository"):
            if has_option(arguments, option):
                raise ServerFailure(f"`llamarec serve` sets {option} itself: leave it out, or run tritonserver instead")
        if option_value(arguments, "--allow-http", "true").lower() in ("false", "0"):
            raise ServerFailure("`llamarec serve` watches the steps over local HTTP: leave --allow-http out")
        self._repository = repository
        port = number_option(arguments, "--http-port", PORTS["http"])
        self._control = Control(f"127.0.0.1:{port}", key or secrets.token_urlsafe(24))
        self._prefix = f"llamarec_{port}_{secrets.token_hex(4)}_"
        self._load = load
        self._arguments = [
            "--model-control-mode=explicit",
            "--strict-readiness=false",  # else one model that fails to load makes the server "not ready"
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
        self._exit_seconds = number_option(self._arguments, "--exit-timeout-secs", EXIT_SECONDS)
        self._health_port = health_port
        self._hang_seconds = hang_seconds
        self._watch: Watch | None = None
        self._ending = threading.Event()

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT, and return the server's exit code.

        A server that exits by itself after it was ready is restarted.

        Raises:
            ServerFailure: no tritonserver is installed, or a port is taken.
        """
        check_ports(self._arguments)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        health = HealthEndpoint(self._health_port, self.health) if self._health_port is not None else None
        with suppress(OSError):  # no release can be promoted in a read-only repository
            self._control.write(self._repository)
        try:
            while True:
                with served_path(self._repository) as served:
                    code, was_ready = self._run_server(served)
                if self._ending.is_set() or not was_ready:
                    return code
                log("server ended", code=code)
                time.sleep(1)
        finally:
            with suppress(OSError):  # a read-only repository has no such file
                (self._repository / CONTROL_FILE).unlink(missing_ok=True)
            if health:
                health.close()

    def _run_server(self, repository: Path) -> tuple[int, bool]:
        """Run one server on a path of the repository; return its exit code, and whether it was ever ready."""
        with suppress(OSError):  # a read-only repository stays as it is, also when a step starts
            compile_models(repository)
        models = [f"--load-model={model}" for model in self._load()]
        command = server_command([f"--model-repository={repository}", *models, *self._arguments])
        # The steps may recognise the key, but not know it.
        environment = {**server_environment(), DIGEST_VARIABLE: digest(os.fsencode(self._control.key))}
        server = ServerProcess(command, environment, self._prefix)
        watch = self._watch = Watch(server, self._control, self._repository, self._hang_seconds)
        next_refresh, was_ready = 0.0, False
        try:
            while server.exit_code() is None and not self._ending.is_set():
                if time.monotonic() >= next_refresh:
                    with suppress(ServingError):  # not listening yet, or too busy to answer
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

    def health(self) -> Health:
        """Return the health that the endpoint reports."""
        watch = self._watch
        steps = {} if watch is None else {name: vars(state) for name, state in sorted(watch.steps.items())}
        return {"ready": watch is not None and watch.is_ready() and not self._ending.is_set(), "steps": steps}
