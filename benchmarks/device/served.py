"""Exports a ranker and measures it in the real tritonserver: served against offline answers, load, and healing.

The second half of :mod:`benchmarks.device.ensemble`, in the environment that serves.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.device.section import ROOT, Section, section_of
from export.repository import Export, export
from llamarec_client.contract import ENSEMBLE
from llamarec_client.errors import ClientError
from llamarec_client.recommender import RecommenderClient
from models.ranker.inference.ranker import RUNTIME_FILE
from serving.layout import step_artifact
from serving.load_test.perf_analyzer import benchmark
from serving.server.local import LocalServer
from serving.server.programs import free_ports

READY_S = 180.0
"""Longest wait for a server or a healed step."""


def measure(section: Section, variant: str) -> None:
    """Record what the ensemble answers, how fast, and how long it takes to heal."""
    artifacts, repository = section.exported(variant)
    export(Export(device="cpu" if section.dry_run else "gpu"), artifacts, repository)
    runtime = step_artifact(repository, "ranker") / RUNTIME_FILE
    section.record("runtime", json.loads(runtime.read_text(encoding="utf-8")))
    whole = variant == "embedded" and not section.dry_run
    section.record("served_equals_offline", compared(artifacts, repository, 200 if whole else 8))
    loads = (1, 2, 4, 8, 16, 32, 64) if whole else (1,) if section.dry_run else (1, 8, 32)
    data = section.data()
    histories = [data.raw_history(user) for user in range(min(200, len(data.users)))]
    with LocalServer(repository, timeout=READY_S) as server:
        for load in loads:
            requests = 4 if section.dry_run else 8 * load
            (row,) = benchmark(server.url, histories, [load], requests=requests)
            section.record("perf_analyzer", [*section.findings.get("perf_analyzer", []), asdict(row)])
    section.record("healing_seconds", healing_seconds(repository, histories[0]))


def compared(artifacts: Path, repository: Path, users: int) -> list[dict[str, Any]]:
    """Return how many users' served answers equal the offline ones bit by bit, at concurrency 1 and 16."""
    command = [sys.executable, "-m", "experiments.served_equals_offline", "--users", str(users)]
    command += ["--artifacts", str(artifacts), "--repository", str(repository)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    if not rows:
        raise RuntimeError(run.stderr[-2000:])
    return rows


def healing_seconds(repository: Path, history: Sequence[str]) -> float:
    """Return the seconds from the ranker's death by SIGKILL until the next ranked answer."""
    with supervised(repository) as url, RecommenderClient(url) as client:
        client.recommend(history, model=ENSEMBLE)
        os.kill(ranker_process(repository), signal.SIGKILL)
        died = time.perf_counter()
        while time.perf_counter() - died < READY_S:
            try:
                client.recommend(history, model=ENSEMBLE, timeout=5)
                return time.perf_counter() - died
            except ClientError:
                time.sleep(0.05)
    raise RuntimeError(f"the ranker was not healed within {READY_S:g} s")


@contextmanager
def supervised(repository: Path) -> Iterator[str]:
    """Run `llamarec serve` within the block, and yield its gRPC address once it is ready."""
    grpc, http, metrics, health = free_ports(4)
    command = [sys.executable, "-m", "llamarec.cli", "serve", "--repository", str(repository)]
    command += [f"--health-port={health}", f"--grpc-port={grpc}", f"--http-port={http}", f"--metrics-port={metrics}"]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        end = time.perf_counter() + READY_S
        while not is_ready(f"http://127.0.0.1:{health}/ready"):
            if process.poll() is not None or time.perf_counter() > end:
                raise RuntimeError("`llamarec serve` did not become ready; its log is above")
            time.sleep(0.1)
        yield f"127.0.0.1:{grpc}"
    finally:
        process.terminate()
        process.wait()


def is_ready(url: str) -> bool:
    """Return whether the health endpoint reports that every step is ready."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def ranker_process(repository: Path) -> int:
    """Return the process id of the ranker's step."""
    script = f"{repository}/ranker/1/model.py"
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # ended meanwhile
            continue
        if script in words:
            return int(path.parent.name)
    raise RuntimeError(f"no process runs {script}")


if __name__ == "__main__":
    measure(*section_of(__doc__, None, "embedded", "llama-7b"))
