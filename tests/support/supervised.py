"""`llamarec serve` as a separate process, and load on it: the helpers that the serving tests share."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from llamarec_client.contract import ENSEMBLE
from serving.contract import STAND_IN
from serving.server.programs import free_ports

Row = tuple[str, float, int]
"""Item, score and retriever rank."""


def inputs_of(history: Sequence[str]) -> list[grpc.InferInput]:
    """Return a request in the plain protocol: the project's client would hide a server's behaviour by its retries."""
    tensor = grpc.InferInput("HISTORY", [1, len(history)], "BYTES")
    array = np.empty((1, len(history)), dtype=object)
    array[0] = [item.encode() for item in history]
    tensor.set_data_from_numpy(array)
    return [tensor]


def rows_of(result: grpc.InferResult) -> list[Row]:
    """Return the answer in the form of :meth:`serving.offline.ExportedSteps.recommend`."""
    columns = [result.as_numpy(name)[0].tolist() for name in ("ITEM_ID", "SCORE", "RETRIEVER_RANK")]
    return [(item.decode(), score, rank) for item, score, rank in zip(*columns, strict=True)]


def ask(url: str, history: Sequence[str], model: str = ENSEMBLE, timeout: float = 30) -> list[Row]:
    """Return the answer to one request, sent over a new connection."""
    with grpc.InferenceServerClient(url) as client:
        return rows_of(client.infer(model, inputs_of(history), client_timeout=timeout))


@dataclass(frozen=True)
class Served:
    """Addresses and log of one running `llamarec serve`."""

    process: subprocess.Popen
    repository: Path
    url: str
    http_url: str
    metrics_url: str
    health_url: str
    log_path: Path

    def health(self) -> tuple[int, Any]:
        """Return status and content of ``/ready``."""
        try:
            with urllib.request.urlopen(f"http://{self.health_url}/ready", timeout=5) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)
        except OSError:
            return 0, {}

    def wait_until_ready(self, seconds: float = 300) -> None:
        wait_for(lambda: self.health()[0] == 200 or self.process.poll() is not None, seconds)
        assert self.health()[0] == 200, self.log_path.read_text()[-3000:]

    def events(self) -> list[dict[str, Any]]:
        """Return what the supervisor logged."""
        return [json.loads(line) for line in self.log_path.read_text().splitlines() if line.startswith('{"time"')]

    def stubs(self, model: str) -> list[int]:
        """Return the process ids of a model's instances in this server; others may serve the same repository.

        A process that stood in for a dead one, and has not ended yet, is none of them.
        """
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().decode().split("\0")
                pid = int(path.parent.name)
                stands_in = any(word.startswith(f"{STAND_IN}_") for word in words)
                if f"{self.repository}/{model}/1/model.py" in words and self.process.pid in ancestors(pid):
                    found += [] if stands_in else [pid]
            except OSError:
                continue
        return sorted(found)

    def kill(self, model: str) -> None:
        """Send SIGKILL to one instance of a model."""
        os.kill(self.stubs(model)[0], signal.SIGKILL)

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples that carry the labels."""
        with urllib.request.urlopen(f"http://{self.metrics_url}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        samples = [line for line in lines if line.startswith((f"{name}{{", f"{name} "))]
        return sum(float(line.split()[-1]) for line in samples if all(label in line for label in wanted))


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> bool:
    """Return whether the condition became true in time."""
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return bool(met)


def ancestors(pid: int) -> Iterator[int]:
    """Yield the process id of each ancestor of a process, its parent first."""
    while pid > 1:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        pid = int(fields[1])
        yield pid


OWN_PROGRAM = (sys.executable, "-m", "llamarec.cli")
"""`llamarec` as this checkout has it."""


def serving(
    repository: Path,
    log: Path,
    *flags: str,
    ready: bool = True,
    environment: Mapping[str, str] | None = None,
    program: Sequence[str] = OWN_PROGRAM,
) -> AbstractContextManager[Served]:
    """Run `llamarec serve` within a context, and end it without leaving anything behind."""
    command = [*program, "serve", f"--repository={repository}"]
    return _running(command, "--health-port={}", repository, log, flags, ready, environment)


def serving_program(code: str, repository: Path, log: Path) -> AbstractContextManager[Served]:
    """Run a program that takes the repository, the health port and the flags, as :func:`serving` does."""
    return _running([sys.executable, "-c", code, str(repository)], "{}", repository, log, (), True, None)


def contention() -> float:
    """Return how much slower this machine is now than when idle: runnable processes for each core, at least 1."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


@contextmanager
def _running(
    program: list[str],
    health_flag: str,
    repository: Path,
    log: Path,
    flags: Sequence[str],
    ready: bool,
    environment: Mapping[str, str] | None,
) -> Iterator[Served]:
    grpc, http, metrics, health = free_ports(4)
    ports = [f"--grpc-port={grpc}", f"--http-port={http}", f"--metrics-port={metrics}"]
    command = [*program, health_flag.format(health), *ports, *flags]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
        )
    addresses = [f"127.0.0.1:{port}" for port in (grpc, http, metrics, health)]
    served = Served(process, repository, *addresses, log)
    try:
        if ready:
            served.wait_until_ready()
        yield served
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()


@dataclass
class Asked:
    """One request of a load: when it began and ended, and its outcome."""

    began: float
    ended: float
    question: int
    answer: list[Row] | None
    error: str = ""


@dataclass
class Load:
    """Clients that send one request after another until the context ends."""

    url: str
    histories: Sequence[Sequence[str]]
    clients: int = 4
    pause: float = 0.0
    asked: list[Asked] = field(default_factory=list)

    def __enter__(self) -> "Load":
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self.asked.sort(key=lambda row: row.began)

    def failures(self) -> list[Asked]:
        return [row for row in self.asked if row.error]

    def _ask(self, number: int) -> None:
        with grpc.InferenceServerClient(self.url) as client:
            while not self._ended.is_set():
                question = number % len(self.histories)
                number += self.clients
                began = time.monotonic()
                try:
                    result = client.infer(ENSEMBLE, inputs_of(self.histories[question]), client_timeout=60)
                    answer, error = rows_of(result), ""
                except InferenceServerException as failure:
                    answer, error = None, str(failure)
                self.asked.append(Asked(began, time.monotonic(), question, answer, error))
                self._ended.wait(self.pause)
