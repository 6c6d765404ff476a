"""The queue of the rankers: what it runs, and how it ends."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments import kept, train_rankers
from experiments.ranker_runs import RUNS


def test_only_runs_whose_scores_are_not_all_kept_are_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The first run has all its files, the second lacks one; a run at its time limit does not stop the queue."""
    monkeypatch.setattr(kept, "RANKERS", tmp_path)
    monkeypatch.setattr(train_rankers, "RUNS", RUNS[:3])
    for path in [*RUNS[0].files().values(), *RUNS[1].files().values()][:-1]:
        path.touch()
    started: list[list[str]] = []

    def run(command: list[str], **given: Any) -> None:
        started.append(command)
        raise subprocess.TimeoutExpired(command, given["timeout"])

    monkeypatch.setattr(subprocess, "run", run)
    train_rankers.train_all(tmp_path / "work", tmp_path / "data")
    assert [command[command.index("--number") + 1] for command in started] == ["1", "2"]
    assert all(command[-2:] == ["--data", str(tmp_path / "data")] for command in started)
    assert capsys.readouterr().out.count("stopped at its time limit") == 2


@pytest.mark.parametrize("name", ["train_rankers", "train_retrievers"])
def test_an_absent_data_folder_is_one_message(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Exit code 2 and no traceback."""
    monkeypatch.setattr(sys, "argv", [name, "--data", str(tmp_path / "nowhere")])
    module = __import__(f"experiments.{name}", fromlist=["main"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2
