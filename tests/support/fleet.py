"""Several `llamarec serve` on one repository with a gateway in front of them, and what their processes hold."""

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from supervised import OWN_PROGRAM, Served, serving, wait_for

from serving.errors import ServerFailure
from serving.server.control import Control

KEY = "key-of-the-fleet"
PATIENCE = 180.0
"""Maximum time in seconds for a server to recover from a disturbance; the serving tests have tighter limits."""


class Held(NamedTuple):
    """What processes hold."""

    memory: int
    """Proportional set size (PSS) in bytes."""
    handles: int
    threads: int


@dataclass(frozen=True)
class Fleet:
    """Running servers and their gateway."""

    servers: Sequence[Served]
    gateway: str
    """``http://HOST:PORT``."""
    gateway_pid: int
    repository: Path

    @property
    def urls(self) -> list[str]:
        """GRPC endpoint of each server."""
        return [served.url for served in self.servers]

    def change(self, change, *arguments) -> None:
        """Promote or roll back on all servers, and retry while a step that is being reloaded makes it fail."""
        controls = Control.several(self.repository, [served.http_url for served in self.servers], KEY)
        end = time.monotonic() + PATIENCE
        while True:
            try:
                change(self.repository, *arguments, servers=controls)
                return
            except ServerFailure:
                if time.monotonic() > end:
                    raise
                time.sleep(0.5)

    def wait_until_whole(self) -> None:
        """Wait until the health port of every server reports that every step answers."""
        for served in self.servers:
            assert wait_for(lambda: served.health()[0] == 200, PATIENCE), served.log_path.read_text()[-3000:]  # noqa: B023

    def held(self) -> dict[str, Held]:
        """Return what the processes of the servers, and of the gateway, hold."""
        found = [family(served.process.pid) for served in self.servers]
        return {"servers": held([pid for pids in found for pid in pids]), "gateway": held([self.gateway_pid])}


@contextmanager
def running_fleet(repository: Path, count: int, folder: Path, store: str) -> Iterator[Fleet]:
    """Run servers, which start one after another and promote nothing, and a gateway.

    Args:
        repository: of releases.
        count: number of servers.
        folder: for their logs.
        store: address of the store of histories, which they share.
    """
    environment = {"LLAMAREC_STORE": store, "LLAMAREC_ADMIN_KEY": KEY}
    with ExitStack() as opened:
        servers = [
            opened.enter_context(
                serving(repository, folder / f"server-{number}.log", ready=False, environment=environment)
            )
            for number in range(count)
        ]
        for served in servers:
            assert wait_for(lambda: served.health()[0] == 503, 60), "nothing is promoted yet"  # noqa: B023
        gateway, pid = opened.enter_context(_gateway([served.url for served in servers], folder / "gateway.log"))
        yield Fleet(servers, gateway, pid, repository)


@contextmanager
def _gateway(urls: Sequence[str], log: Path) -> Iterator[tuple[str, int]]:
    """Run a gateway, and yield its address and its process id."""
    command = [*OWN_PROGRAM, "gateway", "--port", "0", "--servers", ",".join(urls)]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        assert wait_for(lambda: "gateway: http" in log.read_text() or process.poll() is not None, 60)
        yield log.read_text().partition("gateway: ")[2].split()[0], process.pid
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()


def family(pid: int) -> list[int]:
    """Return a process and all its descendants, except those that have ended."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if words[0] != "Z":
            parents[int(path.parent.name)] = int(words[1])
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found


def held(pids: Sequence[int]) -> Held:
    """Return what processes hold together."""
    memory = handles = threads = 0
    for pid in pids:
        folder = Path(f"/proc/{pid}")
        lines = (folder / "smaps_rollup").read_text().splitlines()
        memory += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        handles += len(os.listdir(folder / "fd"))
        threads += len(os.listdir(folder / "task"))
    return Held(memory, handles, threads)


def tritonserver(served: Served) -> tuple[int, str]:
    """Return the process id of a server's tritonserver, and the prefix of its shared memory segments."""
    for pid in family(served.process.pid)[1:]:
        command = Path(f"/proc/{pid}/cmdline").read_text()
        if "shm-region-prefix-name=" in command:
            return pid, command.split("shm-region-prefix-name=")[1].split("\0")[0]
    raise AssertionError("the server runs with a prefix of its own")
