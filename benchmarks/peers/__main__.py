"""Trains SASRec with RecTools, RecBole and this project on the same sequences: seconds, memory, quality over time.

    make peers                                                  # two hours for each system at most
    python -m benchmarks.peers --artifacts DIR --limit-minutes 20 --busy

The systems train one after another, each in a process of its own and by its own training loop. A time is that of the
training steps alone: preparing the data and validating are not counted. Ranks and metrics are this project's for all of
them. A training stops at the limit, or after 1,600 steps without a better validation Recall@10. The result of each
system is kept in a JSON file as soon as it has finished, and a later run skips it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.peers.report import markdown
from benchmarks.peers.training import FACTS, OPTIONS, RANKS, add_training_options
from models.metrics import summary
from preprocessing.artifacts import write_whole
from preprocessing.data import load_data
from preprocessing.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "data" / "peers.json"
PEERS = ROOT / ".venv-peers" / "bin" / "python"
"""The interpreter of the other libraries' environment, which `make peers` installs."""


@dataclass(frozen=True)
class System:
    """The program that trains a system."""

    module: str
    python: Path


SYSTEMS = {
    "ours": System("benchmarks.peers.ours", Path(sys.executable)),
    "RecTools": System("benchmarks.peers.rectools_sasrec", PEERS),
    "RecBole": System("benchmarks.peers.recbole_sasrec", PEERS),
}


def train(system: str, options: Sequence[str], folder: Path) -> dict[str, Any]:
    """Train one system in its own process, and return what it recorded, with its test metrics.

    Args:
        system: a key of :data:`SYSTEMS`.
        options: options of the training's command line.
        folder: folder of the training, which is emptied first.

    Raises:
        InputError: the training failed.
    """
    program = SYSTEMS[system]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [str(program.python), "-W", "ignore", "-m", program.module, *options, "--folder", str(folder)]
    # The libraries write their logs into the current folder.
    ended = subprocess.run(command, check=False, cwd=folder, env={**os.environ, "PYTHONPATH": path})
    if ended.returncode:
        raise InputError(f"the training of {system} ended with exit code {ended.returncode}: see its output above")
    return read_training(folder)


def read_training(folder: Path) -> dict[str, Any]:
    """Return what a finished training recorded in its folder, with the metrics of its test ranks."""
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text())
    ranks = pq.read_table(folder / RANKS)["rank"].to_numpy()
    return {**facts, "test": {name: round(value, 5) for name, value in summary(ranks).items()}}


def read_kept(path: Path, settings: Mapping[str, Any], again: bool) -> dict[str, Any]:
    """Return the kept results of the systems that were measured with these settings.

    Raises:
        InputError: they were measured with other settings, and ``again`` is false.
    """
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if kept.get("settings", settings) == settings:
        systems: dict[str, Any] = kept.get("systems", {})
        return systems
    if not again:
        raise InputError(f"{path} was measured with other settings: give --again to replace it, or another --results")
    return {}


def main() -> None:
    """Parse the command line, train the systems and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_options(parser)
    parser.add_argument(
        "--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="Systems to train. Default: all."
    )
    parser.add_argument(
        "--target", type=float, help="Validation Recall@10 to be reached. Default: the best that ours reached."
    )
    parser.add_argument("--again", action="store_true", help="Train systems again whose results are kept.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file of the results.")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "artifacts" / "peers", help="Folder for weights, logs and ranks."
    )
    given = parser.parse_args()
    try:
        measure(given)
    except InputError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def measure(given: argparse.Namespace) -> None:
    """Train the systems whose results are not kept, keep theirs, and print the tables.

    Raises:
        InputError: there is no data, no environment of the other libraries, or the kept results have other settings.
    """
    data = load_data(given.artifacts)
    threads = 1 if given.busy else given.threads
    settings = {
        "dataset": data.name,
        "data": data.fingerprint,
        "options": asdict(OPTIONS),
        "limit_minutes": given.limit_minutes,
        "threads": threads,
        "clock": "processor" if given.busy else "wall",
    }
    systems = read_kept(given.results, settings, given.again)
    options = ["--artifacts", str(given.artifacts.resolve()), "--limit-minutes", str(given.limit_minutes)]
    options += ["--threads", str(threads), *(["--busy"] if given.busy else [])]
    asked = [system for system in given.systems if system not in systems or given.again]
    for missing in (SYSTEMS[system].python for system in asked if not SYSTEMS[system].python.exists()):
        raise InputError(f"{missing} does not exist: install the other libraries with `make peers`")
    for system in asked:
        trained = {**systems, system: train(system, options, given.work.resolve() / system)}
        systems = {name: trained[name] for name in SYSTEMS if name in trained}
        write_whole(given.results, json.dumps({"settings": settings, "systems": systems}, indent=1) + "\n")
    print(markdown(systems, given.target))


if __name__ == "__main__":
    main()
