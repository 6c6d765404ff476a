"""A real redis-server for the tests that are marked `redis`; they fail where the program is not installed."""

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import redis

from serving.server.programs import free_ports


class RedisServer:
    """A redis-server on the loopback interface that has every command on its disk before it answers.

    Args:
        folder: folder of its file.
        arguments: further options of redis-server.
    """

    def __init__(self, folder: Path, *arguments: str) -> None:
        program = shutil.which("redis-server")
        assert program, "redis-server is not installed: run `make system-packages`"
        (self.port,) = free_ports(1)
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._command = [program, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
        self._command += ["--appendonly", "yes", "--appendfsync", "always", *arguments]
        self.start()

    def start(self) -> None:
        """Start it, and wait until it has read its file."""
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 30
        while time.monotonic() < end:
            with redis.Redis(port=self.port, retry=None) as client, suppress(redis.ConnectionError):
                with suppress(redis.AuthenticationError):
                    client.ping()
                return
            time.sleep(0.02)
        raise AssertionError("redis-server does not answer")

    def flush(self) -> None:
        """Delete everything."""
        with redis.Redis(port=self.port) as client:
            client.flushall()

    def kill(self) -> None:
        """Send SIGKILL, and wait for the end."""
        self.process.kill()
        self.process.wait()


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """Yield an empty running Redis, whose file is in memory: only its process is killed, not the machine."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        server = RedisServer(Path(folder))
        try:
            yield server
        finally:
            server.kill()
