"""Finds the programs tritonserver and perf_analyzer, and builds their command lines and environments.

In NVIDIA's container both are on PATH; elsewhere they come with the nvidia-pytriton and tritonclient wheels. The
wheel's server is located without importing the wheel. It needs help, as measured with version 0.7.0: its Python backend
looks for the stub in the folder of its own library, the stub takes the first ``python`` on PATH for its environment,
and it must find this interpreter's libpython before any other.

The Python backend starts each stub by a line of shell in which no path is quoted: with a space in the path of the
repository or of the stub, a stub ends at once, and the server starts it again, for ever. Both paths are therefore
replaced by links where necessary.
"""

import importlib.util
import os
import shlex
import signal
import socket
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from preprocessing.artifacts import replacing
from serving.errors import BenchmarkError, ServerFailure

LAUNCHER_MARK = "serving.server.launchers"
"""Text in every launcher of :mod:`serving.server.launchers` that distinguishes it from the real program."""
PORTS = {"grpc": 8001, "http": 8000, "metrics": 8002}
"""Triton's default port for each endpoint."""
EXIT_SECONDS = 5
"""Maximum time in seconds for a local server to finish its requests in flight before it exits."""


def own_programs() -> Path:
    """Return the folder of this environment's programs."""
    return Path(sys.prefix) / "bin"


def program_on_path(name: str, *, outside: Path | None = None) -> Path | None:
    """Return the first program of that name on PATH that is not a launcher.

    Args:
        name: name of the program.
        outside: folder to skip. Default: this environment's programs.
    """
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
    """Return whether :mod:`serving.server.launchers` wrote this file."""
    with program.open("rb") as file:
        return LAUNCHER_MARK.encode() in file.read(512)


def wheel_folder() -> Path | None:
    """Return the ``site-packages`` folder of the nvidia-pytriton wheel; None if it is not installed."""
    spec = importlib.util.find_spec("pytriton")
    return Path(spec.origin).parent.parent if spec and spec.origin else None


def fits_a_shell(path: Path) -> bool:
    """Return whether a shell takes an unquoted path for one word, and for nothing else."""
    return shlex.quote(str(path)) == str(path)


@contextmanager
def served_path(repository: Path) -> Iterator[Path]:
    """Yield a path of a model repository that the Python backend can serve: its own, or a link's in a temporary folder.

    Raises:
        ServerFailure: both paths have a space or another character with a meaning in a shell.
    """
    if fits_a_shell(repository):
        yield repository
        return
    with tempfile.TemporaryDirectory(prefix="llamarec-") as folder:
        link = Path(folder) / "repository"
        if not fits_a_shell(link):
            raise ServerFailure(
                f"Triton cannot serve {repository}, nor a link in {folder}, because of a space or a special character:"
                f" set TMPDIR to a folder without one"
            )
        link.symlink_to(repository.resolve())
        yield link


def links_folder(name: str, targets: Mapping[str, Path]) -> Path:
    """Return a folder of this environment, or else of the user's cache, that holds links to ``targets`` by name.

    Raises:
        ServerFailure: neither is writable and has a path that fits a shell.
    """
    for base in (Path(sys.prefix) / "share", Path.home() / ".cache"):
        folder = base / "llamarec" / name
        if not fits_a_shell(folder):
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for link, target in targets.items():
                if not (folder / link).is_symlink() or (folder / link).readlink() != target:
                    with replacing(folder / link) as partial:
                        partial.symlink_to(target)
        except OSError:
            continue
        return folder
    raise ServerFailure(
        f"no folder for links to tritonserver's files: make {sys.prefix}/share or ~/.cache writable, one of them with a"
        f" path without spaces and special characters"
    )


def has_option(arguments: Sequence[str], option: str) -> bool:
    """Return whether ``--option``, ``--option value`` or ``--option=value`` is among the arguments."""
    return any(argument == option or argument.startswith(f"{option}=") for argument in arguments)


def option_value(arguments: Sequence[str], option: str, default: str) -> str:
    """Return the value of the last ``--option``, in either notation; ``default`` if there is none."""
    value = default
    for place, argument in enumerate(arguments):
        if argument.startswith(f"{option}="):
            value = argument.split("=", 1)[1]
        elif argument == option and place + 1 < len(arguments):
            value = arguments[place + 1]
    return value


def number_option(arguments: Sequence[str], option: str, default: int) -> int:
    """Return the value of the last ``--option`` as a number.

    Raises:
        ServerFailure: it is not a number.
    """
    value = option_value(arguments, option, str(default))
    if not value.isdecimal():
        raise ServerFailure(f"{option} is {value!r}: give a whole number")
    return int(value)


def server_command(arguments: Sequence[str]) -> list[str]:
    """Return the command line of the installed tritonserver, with the flags that it needs here added.

    A server on PATH (NVIDIA's container) gets the arguments unchanged.

    Raises:
        ServerFailure: no tritonserver is installed.
    """
    if server := program_on_path("tritonserver"):
        return [str(server), *arguments]
    wheel = wheel_folder()
    if wheel is None:
        raise ServerFailure(
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
        # Auto-completion would start every model twice; the committed configurations are complete.
        "--disable-auto-complete-config": "",
        # This server predates the HTTP security fixes of August 2025: its HTTP endpoint is local by default.
        "--http-address": "=127.0.0.1",
    }
    if not Path("/dev/nvidiactl").exists():
        defaults["--allow-gpu-metrics"] = "=false"
    added = [option + value for option, value in defaults.items() if not has_option(arguments, option)]
    if not any("shm-region-prefix-name" in argument for argument in arguments):
        added.append(shared_memory_flag(f"llamarec_{os.getpid()}_"))
    return [str(files / "bin" / "tritonserver"), *arguments, *added]


def shared_memory_flag(prefix: str) -> str:
    """Return the flag that makes the names of the Python backend's shared memory segments start with ``prefix``."""
    return f"--backend-config=python,shm-region-prefix-name={prefix}"


def prepended(variable: str, folder: str) -> dict[str, str]:
    """Return an environment variable that lists folders, with one more in front."""
    return {variable: os.pathsep.join(filter(None, (folder, os.environ.get(variable))))}


def server_environment() -> dict[str, str]:
    """Return the environment in which the Python backend's stubs find this interpreter and its packages."""
    environment = {**os.environ, **prepended("PATH", str(own_programs()))}
    if program_on_path("tritonserver") is None:  # the container finds its own libraries
        environment |= prepended("LD_LIBRARY_PATH", sysconfig.get_config_var("LIBDIR"))
    return environment


def check_ports(arguments: Sequence[str]) -> None:
    """Check that the ports of a server are free.

    Raises:
        ServerFailure: a port is taken or not allowed; the message names the flag that changes it.
    """
    if has_option(arguments, "--help"):
        return
    for endpoint, default in PORTS.items():
        port = option_value(arguments, f"--{endpoint}-port", str(default))
        unused = option_value(arguments, f"--allow-{endpoint}", "true").lower() in ("false", "0")
        shared = option_value(arguments, f"--reuse-{endpoint}-port", "false").lower() in ("true", "1")
        if unused or shared or not port.isdigit():  # Triton itself rejects a port that is not a number
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignore a stopped server's TIME_WAIT
            try:
                probe.bind(("", int(port)))
            except (OSError, OverflowError):
                raise ServerFailure(
                    f"port {port} is in use or not allowed: free it or give another --{endpoint}-port"
                ) from None


def execute(command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Replace this process with the program, which takes over its process id, signals and exit code."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores SIGPIPE, and the program would inherit that
    sys.stdout.flush()
    os.execve(command[0], list(command), dict(environment))


def exec_server(arguments: Sequence[str]) -> NoReturn:
    """Replace this process with the installed tritonserver, which gets every argument.

    Raises:
        ServerFailure: no tritonserver is installed, a port is taken, or the path of the repository cannot be served.
    """
    command = server_command(arguments)
    for option in ("--model-repository", "--model-store"):
        repository = Path(option_value(arguments, option, "."))
        if not fits_a_shell(repository):
            raise ServerFailure(
                f"tritonserver cannot serve {repository} because of a space or a special character in its path: use"
                f" `llamarec serve`, which serves it through a link, or move it"
            )
    check_ports(arguments)
    execute(command, server_environment())


def free_ports(count: int) -> list[int]:
    """Return ``count`` free ports of the loopback interface."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]
    finally:
        for probe in sockets:
            probe.close()


def perf_analyzer() -> tuple[Path, Mapping[str, str]]:
    """Return the perf_analyzer to run and its environment: the one on PATH, or else the tritonclient wheel's.

    The wheel installs the same binary as ``perf_analyzer`` and ``perf_client``; our launcher replaces the former. Two
    libraries that it needs are in the nvidia-pytriton wheel, with a hash in their names.

    Raises:
        BenchmarkError: no perf_analyzer is installed.
    """
    if program := program_on_path("perf_analyzer"):
        return program, os.environ
    program = own_programs() / "perf_client"
    if not program.is_file():
        raise BenchmarkError("no perf_analyzer is installed: run `pip install tritonclient==2.50.0`")
    wheel = wheel_folder()
    if wheel is None:
        return program, os.environ
    needed = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}
    libraries = wheel / "nvidia_pytriton.libs"
    targets = {name: library for name, pattern in needed.items() for library in libraries.glob(pattern)}
    return program, {**os.environ, **prepended("LD_LIBRARY_PATH", str(links_folder("lib", targets)))}
