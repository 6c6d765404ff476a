"""Trains the rankers of docs/results/ranker.md and keeps their scores in docs/results/data/ranker.

    python -m experiments.train_rankers    # make retrain-ranker: hours; runs whose scores are kept are skipped

Each run of the queue (:data:`experiments.ranker_runs.RUNS`) is a process of its own. A run that reaches its time limit
is stopped; the next call resumes it from its checkpoint.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from experiments.datasets import OPTION, ROOT, add_data_option, data_folder
from experiments.ranker_runs import RUNS, Run
from experiments.ranker_scores import prepare, score_run
from models.ranker.training import train_ranker
from preprocessing.errors import InputError


def train_all(work: Path, data: Path) -> None:
    """Execute every run on the processor whose scores are not all kept.

    Args:
        work: folder for data, weights and checkpoints.
        data: folder with the raw data sets.
    """
    for number, run in enumerate(RUNS):
        if run.device != "cpu" or all(path.exists() for path in run.files().values()):
            continue
        command = [sys.executable, "-m", "experiments.train_rankers", "--number", str(number)]
        command += ["--work", str(work.resolve()), OPTION, str(data.resolve())]
        print(f"{run.name}, at most {run.hours:g} h", flush=True)
        try:
            subprocess.run(command, check=True, cwd=ROOT, timeout=run.hours * 3600)
        except subprocess.TimeoutExpired:
            print(f"{run.name}: stopped at its time limit; the next call resumes it from its checkpoint", flush=True)


def execute(run: Run, work: Path, data: Path) -> None:
    """Train a run unless it is trained, and keep its scores."""
    trained = run.trained()
    folder = prepare(trained, work, data)
    train_ranker(trained.options(), folder)
    score_run(run, folder, work, data)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_option(parser)
    parser.add_argument(
        "--work", type=Path, default=ROOT / "artifacts" / "results", help="Folder for data, weights and checkpoints."
    )
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)  # one run of the queue, in this process
    given = parser.parse_args()
    try:
        data = data_folder(given.data)
        if given.number is None:
            train_all(given.work, data)
        else:
            execute(RUNS[given.number], given.work, data)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
