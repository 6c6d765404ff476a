"""What `llamarec serve` starts, when it starts it again, and what it leaves behind; no tritonserver runs here."""

import json
import os
import signal
import socket
import stat
import tempfile
import time
import types
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from serving.errors import ServerFailure, ServerUnreachable
from serving.server.control import CONTROL_FILE, Control
from serving.server.process import SHARED_MEMORY, ServerProcess, is_alive
from serving.server.programs import free_ports, option_value
from serving.server.supervisor import Supervisor
from serving.server.watch import StepState

KEY = "the-key"


class Server:
    """Stands in for one tritonserver: becomes ready, does what a test wants meanwhile, and ends."""

    def __init__(self, code: int | None = None, *, ready: bool = True, meanwhile: Callable[[], Any] = lambda: None):
        self.code = code
        """Exit code with which it ends by itself; None: it runs until it is stopped, and ends with 0."""
        self.ready = ready
        self.meanwhile = meanwhile
        self.looks = 0
        self.stopped_after: float | None = None

    def started(self, command: Sequence[str], environment: dict[str, str], prefix: str) -> "Server":
        self.command, self.environment, self.prefix = list(command), environment, prefix
        return self

    def exit_code(self) -> int | None:
        self.looks += 1
        if self.looks == 2:  # between two rounds of the supervisor, after the first
            self.meanwhile()
        return self.code if self.looks > 2 else None

    def stop(self, seconds: float) -> int:
        self.stopped_after = seconds
        self.watch.calls.append("server stopped")
        return 0 if self.code is None else self.code


class SteadyWatch:
    """Stands in for the watch: knows one step, and is ready when the stand-in of the server is."""

    def __init__(self, server: Server, control: Control, repository: Path, hang_seconds: float) -> None:
        self.server, self.given = server, (control, repository, hang_seconds)
        self.models = {"features", "llamarec"}
        self.steps = {"features": StepState(alive=server.ready, reason="")}
        self.calls: list[str] = []
        server.watch = self

    def is_ready(self) -> bool:
        return self.server.ready

    def refresh(self) -> None:
        self.calls.append("refresh")
        raise ServerUnreachable("not listening yet")

    def look_for_deaths(self) -> None:
        self.calls.append("look")

    def stop(self) -> None:
        self.calls.append("stop")


@pytest.fixture
def servers(monkeypatch) -> Iterator[list[Server]]:
    """The servers that a supervisor will start, one after another; signals are handled as before after the test."""
    waiting: list[Server] = []
    started = iter(waiting)
    namespace = "serving.server.supervisor"
    monkeypatch.setattr(f"{namespace}.ServerProcess", lambda *given: next(started).started(*given))
    monkeypatch.setattr(f"{namespace}.Watch", SteadyWatch)
    monkeypatch.setattr(f"{namespace}.server_command", lambda arguments: ["tritonserver", *arguments])
    monkeypatch.setattr(f"{namespace}.server_environment", lambda: {"PATH": "/bin"})
    monkeypatch.setattr(f"{namespace}.time", types.SimpleNamespace(sleep=lambda seconds: None, monotonic=lambda: 5.0))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield waiting
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def flags() -> list[str]:
    """Flags of ports that are free."""
    return [f"--{name}-port={port}" for name, port in zip(("grpc", "http", "metrics"), free_ports(3), strict=True)]


def terminate(number: int = signal.SIGTERM) -> Callable[[], None]:
    """Send a signal to this process, as an orchestrator or the terminal does."""
    return lambda: os.kill(os.getpid(), number)


def events(capsys: pytest.CaptureFixture[str]) -> list[tuple[str, Any]]:
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    return [(line["event"], line.get("code", line.get("models"))) for line in lines]


# --- flags


@pytest.mark.parametrize(
    "flag",
    [
        "--model-control-mode=none",
        "--load-model=ranker",
        "--model-repository=/elsewhere",
        "--allow-http=false",
        "--allow-http=0",
    ],
)
@pytest.mark.parametrize("joined", [True, False])
def test_what_the_supervisor_needs_itself_is_refused(tmp_path, flag, joined):
    """It loads models by name and watches over HTTP: another value would break that, in either notation."""
    name, _, value = flag.partition("=")
    with pytest.raises(ServerFailure, match=f"{name} "):
        Supervisor(tmp_path, [flag] if joined else [name, value])


@pytest.mark.parametrize("flag", ["--http-port=http", "--exit-timeout-secs=1.5"])
def test_a_number_that_is_none_is_refused(tmp_path, flag):
    """The supervisor reads both itself; its error names the flag and the value."""
    name, _, value = flag.partition("=")
    with pytest.raises(ServerFailure, match=f"{name} is '{value}'"):
        Supervisor(tmp_path, [flag])


def test_the_command_line_of_the_server(servers, tmp_path, flags):
    """Flag by flag after tritonserver's own help: models are loaded by name, one that fails does not make the server
    unready, four APIs want the key over HTTP and gRPC, and HTTP listens on this machine only. The steps get
    the key's digest, not the key.
    """
    servers.append(Server(meanwhile=terminate()))
    Supervisor(tmp_path, flags, load=lambda: ["llamarec", "llamarec_r1"], key=KEY).run()
    (server,) = servers
    restricted = f"model-repository,shared-memory,trace,logging:llamarec-key={KEY}"
    assert sorted(server.command) == sorted(
        [
            "tritonserver",
            f"--model-repository={tmp_path}",
            "--model-control-mode=explicit",
            "--load-model=llamarec",
            "--load-model=llamarec_r1",
            "--strict-readiness=false",
            *flags,
            f"--backend-config=python,shm-region-prefix-name={server.prefix}",
            f"--http-restricted-api={restricted}",
            f"--grpc-restricted-protocol={restricted}",
            "--http-address=127.0.0.1",
            "--exit-timeout-secs=10",
        ]
    )
    assert server.environment == {"PATH": "/bin", "LLAMAREC_ADMIN_KEY_SHA256": sha256(KEY.encode()).hexdigest()}


def test_a_repository_with_a_space_in_its_path_is_served_through_a_link(servers, tmp_path, flags):
    """Triton cannot serve it (triton-inference-server/python_backend#404); its control file is in the real folder."""
    repository = tmp_path / "my models"
    repository.mkdir()
    seen = []

    def look() -> None:
        (path,) = (flag.partition("=")[2] for flag in servers[0].command if flag.startswith("--model-repository="))
        seen.extend([path, Path(path).resolve(), (repository / CONTROL_FILE).is_file()])
        terminate()()

    servers.append(Server(meanwhile=look))
    Supervisor(repository, flags).run()
    assert " " not in seen[0]
    assert seen[1:] == [repository.resolve(), True]


def test_by_default_every_model_is_loaded(servers, tmp_path, flags):
    """Triton's explicit mode loads all of a repository for ``*``."""
    servers.append(Server(meanwhile=terminate()))
    Supervisor(tmp_path, flags).run()
    assert "--load-model=*" in servers[0].command


def test_the_callers_flags_replace_defaults(servers, tmp_path, flags):
    """An operator may open HTTP or restrict nothing: each of these flags is then there once, and the time that a
    server has to exit follows, with 5 s on top before it is killed.
    """
    own = ["--http-address=0.0.0.0", "--exit-timeout-secs=7", "--http-restricted-api=trace:x=y"]
    servers.append(Server(meanwhile=terminate()))
    Supervisor(tmp_path, [*flags, *own]).run()
    (server,) = servers
    for flag in own:
        name = flag.split("=")[0]
        assert [argument for argument in server.command if argument.startswith(name)] == [flag]
    assert server.stopped_after == 12


def test_each_supervisor_has_a_key_of_its_own(servers, tmp_path, flags):
    """24 random bytes are 32 characters of base64; what one run's file says opens no other run's server."""
    keys = []
    for _ in range(2):
        servers.append(Server(meanwhile=lambda: (keys.append(Control.read(tmp_path).key), terminate()())))
        Supervisor(tmp_path, flags).run()
    assert [len(key) for key in keys] == [32, 32]
    assert keys[0] != keys[1]
    for server, key in zip(servers, keys, strict=True):
        assert option_value(server.command, "--grpc-restricted-protocol", "").endswith(f":llamarec-key={key}")


# --- running


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_server_in_order(servers, tmp_path, flags, number):
    """The watch is stopped before the server is, so that nothing is healed meanwhile; the exit code is the server's."""
    servers.append(Server(meanwhile=terminate(number)))
    assert Supervisor(tmp_path, flags, hang_seconds=3.0).run() == 0
    (server,) = servers
    assert server.stopped_after == 15, "ten seconds to finish requests and five more"
    assert server.watch.calls[-2:] == ["stop", "server stopped"]
    assert {"refresh", "look"} <= set(server.watch.calls), "an endpoint that does not answer yet is no failure"
    assert server.watch.given[1:] == (tmp_path, 3.0)


def test_a_server_that_ends_after_it_was_ready_is_started_again(servers, tmp_path, flags, capsys):
    """137 is 128 + 9: the kernel killed it. The second server has the same command, and a signal ends that one."""
    servers += [Server(137), Server(meanwhile=terminate())]
    assert Supervisor(tmp_path, flags, key=KEY).run() == 0
    first, second = servers
    assert first.watch.calls[-2:] == ["stop", "server stopped"]
    assert second.command == first.command
    assert events(capsys) == [
        ("ready", ["features", "llamarec"]),
        ("server ended", 137),
        ("ready", ["features", "llamarec"]),
    ]


def test_a_server_that_is_started_again_loads_what_was_promoted_meanwhile(servers, tmp_path, flags):
    """The models are read from the state at each start: at the first one, nothing may have been promoted yet."""
    promoted = ["events"]
    servers += [Server(137, meanwhile=lambda: promoted.append("llamarec_r1")), Server(meanwhile=terminate())]
    Supervisor(tmp_path, flags, load=lambda: list(promoted)).run()
    loaded = [[flag for flag in server.command if flag.startswith("--load-model")] for server in servers]
    assert loaded == [["--load-model=events"], ["--load-model=events", "--load-model=llamarec_r1"]]


def test_a_server_that_never_was_ready_is_not_started_again(servers, tmp_path, flags, capsys):
    """A flag it refuses or a library it lacks would be refused for ever: its exit code goes on to the caller."""
    servers.append(Server(1, ready=False))
    assert Supervisor(tmp_path, flags).run() == 1
    assert servers[0].stopped_after is not None, "what is left of it is cleaned up"
    assert events(capsys) == []


def test_a_signal_while_the_server_ends_by_itself_is_the_last_word(servers, tmp_path, flags):
    """An orchestrator that stops the container may stop the server first: it is not started again."""
    servers.append(Server(143, meanwhile=terminate()))
    assert Supervisor(tmp_path, flags).run() == 143


# --- the control file


def test_address_and_key_stand_beside_the_models_while_the_server_runs(servers, tmp_path, flags):
    """For this user only, 0600, with the address of the HTTP port that was asked for; gone afterwards."""
    seen = []

    def look() -> None:
        seen.append((stat.S_IMODE((tmp_path / CONTROL_FILE).stat().st_mode), Control.read(tmp_path)))
        os.kill(os.getpid(), signal.SIGTERM)

    servers.append(Server(meanwhile=look))
    Supervisor(tmp_path, flags, key=KEY).run()
    port = flags[1].rpartition("=")[2]
    assert seen == [(0o600, Control(f"127.0.0.1:{port}", KEY))]
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_cannot_be_started_leaves_no_control_file(servers, tmp_path, flags, monkeypatch):
    """Or `llamarec release` would look for a server that never ran."""

    def no_server(arguments: Sequence[str]) -> list[str]:
        raise ServerFailure("no tritonserver is installed")

    monkeypatch.setattr("serving.server.supervisor.server_command", no_server)
    with pytest.raises(ServerFailure, match="no tritonserver"):
        Supervisor(tmp_path, flags).run()
    assert list(tmp_path.iterdir()) == []


def test_a_taken_port_is_refused_before_anything_is_written(servers, tmp_path):
    """Another server may run on this very repository: its address and key must stay."""
    (tmp_path / CONTROL_FILE).write_text('{"url": "127.0.0.1:1", "key": "other"}')
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServerFailure, match=f"port {port} .*--http-port"):
            Supervisor(tmp_path, [f"--http-port={port}", "--allow-grpc=false", "--allow-metrics=false"]).run()
    assert Control.read(tmp_path) == Control("127.0.0.1:1", "other")


# --- the child process


STUBS = """
sh -c 'sleep 60; :' /models/ranker_r1/1/model.py prefix 1048576 1048576 99 /backends/python 336 ranker_r1_0_0 DEFAULT &
sh -c 'sleep 60; :' /models/features/1/model.py prefix 1048576 1048576 99 /backends/python 336 features_0_0 DEFAULT &
sleep 60 &
echo started
wait
"""
"""A shell in the place of tritonserver: two of its children have the command line of a Python model's process."""


@pytest.fixture
def process(tmp_path) -> Iterator[ServerProcess]:
    with (tmp_path / "log").open("w+b") as log:
        process = ServerProcess(["sh", "-c", STUBS], {"PATH": os.environ["PATH"]}, f"llamarec_test_{os.getpid()}_", log)
        try:
            assert wait_for(lambda: len(process.stubs()) == 2 and (tmp_path / "log").read_text() == "started\n")
            yield process
        finally:
            process.stop(5)


def wait_for(condition: Callable[[], Any], seconds: float = 5) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return bool(condition())


def test_the_processes_of_models_are_told_by_name(process):
    """The command line of Triton's stub, as seen with the wheel's server: the model is the folder two above its file,
    the instance comes before the last word. Other children are none, and neither is one that was killed and not
    collected yet.
    """
    stubs = sorted(process.stubs(), key=lambda stub: stub.model)
    assert [(stub.model, stub.instance) for stub in stubs] == [
        ("features", "features_0_0"),
        ("ranker_r1", "ranker_r1_0_0"),
    ]
    os.kill(process.pid, signal.SIGSTOP)  # so that the shell does not collect its child
    os.kill(stubs[0].pid, signal.SIGKILL)
    assert wait_for(lambda: not is_alive(stubs[0].pid))
    assert Path(f"/proc/{stubs[0].pid}").exists()
    assert process.stubs() == [stubs[1]]
    os.kill(process.pid, signal.SIGCONT)


def test_stopping_leaves_neither_processes_nor_shared_memory(process):
    """The server ends by SIGTERM, -15 as subprocess tells it; its children and its segments go with it, others stay."""
    own = SHARED_MEMORY / f"llamarec_test_{os.getpid()}_segment"
    others = SHARED_MEMORY / f"llamarec_other_{os.getpid()}_segment"
    own.touch()
    others.touch()
    stubs = process.stubs()
    assert process.exit_code() is None
    try:
        assert process.stop(5) == -15
        assert process.exit_code() == -15
        assert not own.exists()
        assert others.exists()
    finally:
        others.unlink()
    assert wait_for(lambda: not any(is_alive(stub.pid) for stub in stubs))
    assert not is_alive(process.pid)
    assert process.stop(5) == -15, "stopping again changes nothing"


def test_a_server_that_ignores_the_signal_is_killed():
    """SIGTERM is ignored, as by a server that hangs: after the time it was given, here 50 ms, it is killed (-9)."""
    command = ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 60; done"]
    with tempfile.TemporaryFile() as log:
        process = ServerProcess(command, {"PATH": os.environ["PATH"]}, f"llamarec_test_{os.getpid()}_", log)
        assert wait_for(lambda: os.fstat(log.fileno()).st_size)
        assert process.stop(0.05) == -9


# --- health


def test_health_before_a_server_runs(tmp_path):
    assert Supervisor(tmp_path).health() == {"ready": False, "steps": {}}


@pytest.mark.parametrize(("ready", "status"), [(True, 200), (False, 503)])
def test_orchestrators_are_told_the_state_of_each_step(servers, tmp_path, flags, ready, status):
    """Asked over HTTP while the server runs; once it has ended, nothing listens there."""
    (port,) = free_ports(1)
    answers = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as response:
                answers.append((response.status, json.load(response)))
        except urllib.error.HTTPError as error:
            answers.append((error.code, json.load(error)))
        os.kill(os.getpid(), signal.SIGTERM)

    servers.append(Server(ready=ready, meanwhile=ask))
    Supervisor(tmp_path, flags, health_port=port).run()
    step = {"alive": ready, "healing": False, "revived": 0, "reason": ""}
    assert answers == [(status, {"ready": ready, "steps": {"features": step}})]
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_supervisor_that_is_ending_is_not_ready(servers, tmp_path, flags):
    """A load balancer must send nothing more from the signal on, though the steps still answer."""
    seen = []
    supervisor = Supervisor(tmp_path, flags)

    def look() -> None:
        seen.append(supervisor.health()["ready"])
        os.kill(os.getpid(), signal.SIGTERM)
        seen.append(supervisor.health()["ready"])

    servers.append(Server(meanwhile=look))
    supervisor.run()
    assert seen == [True, False]
