"""Runs a tritonserver on the loopback interface for the duration of a ``with`` block, for demos and measurements."""

import os
import re
import socket
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from serving.errors import ServerFailure
from serving.layout import check_adapters
from serving.server.process import ServerProcess
from serving.server.programs import (
    EXIT_SECONDS,
    check_ports,
    free_ports,
    served_path,
    server_command,
    server_environment,
    shared_memory_flag,
)


class LocalServer:
    """A tritonserver on the loopback interface that runs for the duration of the ``with`` block.

    However the block ends, no process and no shared memory remains. The kernel also stops the server when the thread
    that entered the block ends, so enter it in a thread that outlives the block.

    Args:
        repository: the model repository to serve.
        arguments: additional flags for tritonserver.
        grpc_port: port of the gRPC endpoint. Default: a free port.
        http_port: port of the HTTP endpoint. Default: a free port.
        metrics_port: port of the metrics endpoint. Default: a free port.
        log: file for the server's log. Default: a temporary file that is deleted with the server.
        timeout: maximum time in seconds until the server is ready.

    Raises:
        ServerFailure: a port is taken, no tritonserver is installed, or the server did not become ready; the message
            then quotes the server's log.
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
        self._repository = repository
        self._arguments = list(arguments)
        self._log_path = log
        self._timeout = timeout
        self._process: ServerProcess | None = None
        self._prefix = ""
        self._open = ExitStack()

    @property
    def pid(self) -> int:
        """Process id of the server."""
        assert self._process is not None, "the server runs only inside the with block"
        return self._process.pid

    def __enter__(self) -> "LocalServer":
        check_adapters(self._repository)
        own = [f"--exit-timeout-secs={EXIT_SECONDS}"]
        for endpoint, url in self._endpoints().items():
            address, port = url.split(":")
            own += [f"--{endpoint}-address={address}", f"--{endpoint}-port={port}"]
        check_ports(own)
        self._prefix = f"llamarec_{self.url.split(':')[1]}_{os.getpid()}_"
        self._log = self._open.enter_context(self._log_path.open("w+b") if self._log_path else tempfile.TemporaryFile())
        try:
            served = f"--model-repository={self._open.enter_context(served_path(self._repository))}"
            command = server_command([served, *self._arguments, *own, shared_memory_flag(self._prefix)])
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
        """Return the address of each endpoint, by Triton's name for it."""
        return {"grpc": self.url, "http": self.http_url, "metrics": self.metrics_url}

    def log(self) -> str:
        """Return everything that the server has logged so far."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def _wait_until_ready(self, process: ServerProcess) -> None:
        end = time.monotonic() + self._timeout
        while time.monotonic() < end:
            if (code := process.exit_code()) is not None:
                raise ServerFailure(f"tritonserver exited with code {code}:\n{self._complaints()}")
            if self._is_ready():
                return
            time.sleep(0.05)
        raise ServerFailure(f"tritonserver was not ready after {self._timeout:g} s:\n{self._complaints()}")

    def _is_ready(self) -> bool:
        from tritonclient.grpc import InferenceServerClient
        from tritonclient.utils import InferenceServerException

        # The HTTP endpoints open after gRPC's. Sockets first: gRPC retries a refused connection only after a second.
        for endpoint, url in self._endpoints().items():
            if f"--allow-{endpoint}=false" not in self._arguments:
                host, port = url.split(":")
                try:
                    socket.create_connection((host, int(port)), timeout=1).close()
                except OSError:
                    return False
        try:
            # A proxy of the environment cannot reach this machine's loopback interface.
            with InferenceServerClient(self.url, channel_args=[("grpc.enable_http_proxy", 0)]) as client:
                return bool(client.is_server_ready(client_timeout=1))
        except InferenceServerException:
            return False

    def _complaints(self) -> str:
        """Return the errors in the server's log, or else the end of the log."""
        lines = self.log().splitlines()
        # Without a GPU driver, every start logs an irrelevant error about CudaDriverHelper.
        errors = [line for line in lines if re.match(r"E\d{4} (?!.*CudaDriverHelper)|error:", line)]
        return "\n".join(errors[:10] or lines[-20:])

    def _stop(self) -> None:
        try:
            if self._process is not None:
                self._process.stop(2 * EXIT_SECONDS)
        finally:
            self._open.close()
