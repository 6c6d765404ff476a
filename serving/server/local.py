"""A tritonserver on the loopback interface for as long as a ``with`` block lasts: for demos, benchmarks and tests."""

import os
import re
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from serving.errors import ServerFailure
from serving.layout import check_adapters
from serving.server.process import ServerProcess
from serving.server.programs import (
    EXIT_SECONDS,
    check_ports,
    free_ports,
    server_command,
    server_environment,
    shared_memory_flag,
)


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
        ServerFailure: a port is taken, no tritonserver is installed, or it did not become ready; the last carries what
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
        self._repository = repository
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
        check_adapters(self._repository)
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
                raise ServerFailure(f"tritonserver exited with code {code}:\n{self._complaints()}")
            if self._is_ready():
                return
            time.sleep(0.05)
        raise ServerFailure(f"tritonserver was not ready after {self._timeout:g} s:\n{self._complaints()}")

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
