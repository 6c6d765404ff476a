"""Finding and starting tritonserver: the one on PATH in NVIDIA's container, elsewhere the nvidia-pytriton wheel's.

The wheel's server is found without importing the wheel and needs help, as measured against version 0.7.0:
its Python backend looks for the stub beside its own library, the stub takes the first ``python`` on PATH for its
environment, and it must find this interpreter's libpython before any other.
"""

import importlib.util
import os
import re
import signal
import socket
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from client.errors import ServerError
from client.process import ServerProcess

LAUNCHER_MARK = "client.launchers"
"""Stands in every launcher that :mod:`client.launchers` writes, so that none is taken for the real program."""
PORTS = {"grpc": 8001, "http": 8000, "metrics": 8002}
"""Triton's default port of each endpoint."""
EXIT_SECONDS = 5
"""How long a local server may finish requests in flight before it exits."""


def own_programs() -> Path:
    """The folder of this environment's programs."""
    return Path(sys.prefix) / "bin"


def program_on_path(name: str, *, outside: Path | None = None) -> Path | None:
    """The first program of that name on PATH that is no launcher and not in ``outside`` (this environment's folder)."""
    skipped = (outside or own_programs()).resolve()
    for folder in map(Path, os.get_exec_path()):
        program = folder / name
        if (
            folder.resolve() != skipped
            and os.access(program, os.X_OK)
            and program.is_file()
            and not is_launcher(program)
        ):
            return program
    return None


def is_launcher(program: Path) -> bool:
    """Whether :mod:`client.launchers` wrote this file."""
    with program.open("rb") as file:
        return LAUNCHER_MARK.encode() in file.read(512)


def wheel_folder() -> Path | None:
    """The ``site-packages`` folder that holds the nvidia-pytriton wheel's files."""
    spec = importlib.util.find_spec("pytriton")
    return Path(spec.origin).parent.parent if spec and spec.origin else None


def links_folder(name: str, targets: Mapping[str, Path]) -> Path:
    """A folder of this environment that holds links to ``targets`` under the given names.

    Raises:
        ServerError: neither the environment nor the user's cache can be written.
    """
    for base in (Path(sys.prefix) / "share", Path.home() / ".cache"):
        folder = base / "llamarec" / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for link, target in targets.items():
                if not (folder / link).is_symlink() or (folder / link).readlink() != target:
                    aside = folder / f".{link}.{os.getpid()}"
                    aside.symlink_to(target)
                    aside.replace(folder / link)
        except OSError:
            continue
        return folder
    raise ServerError(f"tritonserver's files cannot be laid out: make {sys.prefix}/share or ~/.cache writable")


def has_option(arguments: Sequence[str], option: str) -> bool:
    """Whether ``--option``, ``--option value`` or ``--option=value`` stands among the arguments."""
    return any(argument == option or argument.startswith(f"{option}=") for argument in arguments)


def option_value(arguments: Sequence[str], option: str, default: str) -> str:
    """The value of the last ``--option``, in either notation."""
    value = default
    for place, argument in enumerate(arguments):
        if argument.startswith(f"{option}="):
            value = argument.split("=", 1)[1]
        elif argument == option and place + 1 < len(arguments):
            value = arguments[place + 1]
    return value


def server_command(arguments: Sequence[str]) -> list[str]:
    """The command line of the tritonserver that is installed, with the flags it needs here and was not given.

    A server on PATH (NVIDIA's container) gets the arguments as they are.

    Raises:
        ServerError: no tritonserver is installed.
    """
    if server := program_on_path("tritonserver"):
        return [str(server), *arguments]
    wheel = wheel_folder()
    if wheel is None:
        raise ServerError(
            "no tritonserver is on PATH and the nvidia-pytriton wheel is not installed: "
            "run inside NVIDIA's Triton container or `pip install 'llamarec[server]'`"
        )
    files = wheel / "pytriton" / "tritonserver"
    python = files / "backends" / "python"
    stub = "triton_python_backend_stub"
    stub_file = files / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}" / stub
    libraries = ("libtriton_python.so", "triton_python_backend_utils.py")
    backend = links_folder("backends/python", {**{name: python / name for name in libraries}, stub: stub_file})
    defaults = {
        "--backend-directory": f"={backend.parent}",
        # Automatic completion starts every model twice; the committed configurations are complete.
        "--disable-auto-complete-config": "",
        # This server predates the HTTP fixes of August 2025: not reachable from elsewhere unless asked for.
        "--http-address": "=127.0.0.1",
    }
    if not Path("/dev/nvidiactl").exists():
        defaults["--allow-gpu-metrics"] = "=false"
    added = [option + value for option, value in defaults.items() if not has_option(arguments, option)]
    if not any("shm-region-prefix-name" in argument for argument in arguments):
        added.append(shared_memory_flag(f"llamarec_{os.getpid()}_"))
    return [str(files / "bin" / "tritonserver"), *arguments, *added]


def shared_memory_flag(prefix: str) -> str:
    """The flag under which the Python backend's shared memory segments start with ``prefix``."""
    return f"--backend-config=python,shm-region-prefix-name={prefix}"


def prepended(variable: str, folder: str) -> dict[str, str]:
    """An environment variable that lists folders, with one more in front."""
    return {variable: os.pathsep.join(filter(None, (folder, os.environ.get(variable))))}


def server_environment() -> dict[str, str]:
    """The environment in which the Python backend's stubs find this interpreter and its packages."""
    environment = {**os.environ, **prepended("PATH", str(own_programs()))}
    if program_on_path("tritonserver") is None:  # the container's libraries are in order as they are
        environment |= prepended("LD_LIBRARY_PATH", sysconfig.get_config_var("LIBDIR"))
    return environment


def check_ports(arguments: Sequence[str]) -> None:
    """Refuses to start a server whose port is taken.

    Raises:
        ServerError: names the port and the flag that changes it.
    """
    if has_option(arguments, "--help"):
        return
    for endpoint, default in PORTS.items():
        port = option_value(arguments, f"--{endpoint}-port", str(default))
        unused = option_value(arguments, f"--allow-{endpoint}", "true").lower() in ("false", "0")
        shared = option_value(arguments, f"--reuse-{endpoint}-port", "false").lower() in ("true", "1")
        if unused or shared or not port.isdigit():  # a port that is no number is Triton's to refuse
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server just stopped does not hold it
            try:
                probe.bind(("", int(port)))
            except (OSError, OverflowError):
                raise ServerError(
                    f"port {port} is in use or not allowed: stop what listens there or give another --{endpoint}-port"
                ) from None


def execute(command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Becomes the program, so that its process id, signals and exit code are this process's own."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and an ignored signal would be inherited
    sys.stdout.flush()
    os.execve(command[0], list(command), dict(environment))


def exec_server(arguments: Sequence[str]) -> NoReturn:
    """Becomes the tritonserver that is installed; every argument passes through.

    Raises:
        ServerError: none is installed, or a port is taken.
    """
    command = server_command(arguments)
    check_ports(arguments)
    execute(command, server_environment())


def free_ports(count: int) -> list[int]:
    """Ports on the loopback interface that nothing listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]
    finally:
        for probe in sockets:
            probe.close()


class LocalServer:
    """A tritonserver on the loopback interface that lives as long as the ``with`` block.

    Leaving the block, by whatever error or interruption, leaves no process and no shared memory behind.
    The kernel also stops the server when the thread that entered the block ends, so enter it in one that stays.

    Args:
        repository: the model repository to serve.
        arguments: further flags for tritonserver.
        grpc_port: and ``http_port``, ``metrics_port``: a free one when not given.
        log: where the server's log goes; by default a temporary file that goes with the server.
        timeout: seconds the server may take to become ready.

    Raises:
        ServerError: a port is taken, no tritonserver is installed, or it did not become ready; the last carries what
            the server logged.
    """

    def __init__(
        self,
        repository: Path,
        *,
        arguments: Sequence[str] = (),
        grpc_port: int | None = None,
        http_port: int | None = None,
        metrics_port: int | None = None,
        log: Path | None = None,
        timeout: float = 120.0,
    ) -> None:
        free = iter(free_ports(3))
        self.url = f"127.0.0.1:{grpc_port or next(free)}"
        self.http_url = f"127.0.0.1:{http_port or next(free)}"
        self.metrics_url = f"127.0.0.1:{metrics_port or next(free)}"
        self._arguments = [f"--model-repository={repository}", *arguments]
        self._log_path = log
        self._timeout = timeout
        self._process: ServerProcess | None = None
        self._prefix = ""

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self._process is not None, "the server runs only inside the with block"
        return self._process.pid

    def __enter__(self) -> "LocalServer":
        own = [f"--exit-timeout-secs={EXIT_SECONDS}"]
        for endpoint, url in self._endpoints().items():
            address, port = url.split(":")
            own += [f"--{endpoint}-address={address}", f"--{endpoint}-port={port}"]
        check_ports(own)
        self._prefix = f"llamarec_{self.url.split(':')[1]}_{os.getpid()}_"
        command = server_command([*self._arguments, *own, shared_memory_flag(self._prefix)])
        self._log = self._log_path.open("w+b") if self._log_path else tempfile.TemporaryFile()
        try:
            self._process = ServerProcess(command, server_environment(), self._prefix, self._log)
            self._wait_until_ready(self._process)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _endpoints(self) -> dict[str, str]:
        """Addresses by Triton's names."""
        return {"grpc": self.url, "http": self.http_url, "metrics": self.metrics_url}

    def log(self) -> str:
        """Everything the server has logged so far."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def _wait_until_ready(self, process: ServerProcess) -> None:
        end = time.monotonic() + self._timeout
        while time.monotonic() < end:
            if (code := process.exit_code()) is not None:
                raise ServerError(f"tritonserver exited with code {code}:\n{self._complaints()}")
            if self._is_ready():
                return
            time.sleep(0.05)
        raise ServerError(f"tritonserver was not ready after {self._timeout:g} s:\n{self._complaints()}")

    def _is_ready(self) -> bool:
        from tritonclient.grpc import InferenceServerClient
        from tritonclient.utils import InferenceServerException

        # The HTTP endpoints open after gRPC's. A refused gRPC connection would be tried again only after a second.
        for endpoint, url in self._endpoints().items():
            if f"--allow-{endpoint}=false" not in self._arguments:
                host, port = url.split(":")
                try:
                    socket.create_connection((host, int(port)), timeout=1).close()
                except OSError:
                    return False
        try:
            with InferenceServerClient(self.url) as client:
                return bool(client.is_server_ready(client_timeout=1))
        except InferenceServerException:
            return False

    def _complaints(self) -> str:
        """The errors that the server logged, or else the end of its log."""
        lines = self.log().splitlines()
        # Every start without a GPU driver logs one error, about CudaDriverHelper, that explains nothing.
        errors = [line for line in lines if re.match(r"E\d{4} (?!.*CudaDriverHelper)|error:", line)]
        return "\n".join(errors[:10] or lines[-20:])

    def _stop(self) -> None:
        try:
            if self._process is not None:
                self._process.stop(2 * EXIT_SECONDS)
        finally:
            self._log.close()
