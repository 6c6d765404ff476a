"""A simulation with the real stages: users' habits change, the refreshed release wins, and a spoilt one is refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from drift import FIRST_ERA, SECOND_ERA, STEPS, era, write
from safetensors.numpy import load_file, save_file

from export.release import build_release
from export.repository import Export
from llamarec.refresh import run as module
from llamarec.refresh.events import Source
from llamarec.refresh.run import Refresh, refresh
from models.retriever.trained import WEIGHTS
from models.signals.signals import WEIGHTS_FILE
from preprocessing.artifacts import new_artifact, read_manifest
from preprocessing.data import load_data
from serving.offline import ExportedSteps
from serving.server.releases import State, list_releases

pytestmark = pytest.mark.thorough
CODE = "from llamarec.cli import main; main()"


@pytest.fixture(scope="module")
def released(shop, tmp_path_factory):
    """Return a folder with the shop's artifacts, its first release, which is served, and later events.

    In ``new.csv`` the habits have changed, in ``same.csv`` they have not.
    """
    folder = shutil.copytree(shop, tmp_path_factory.mktemp("released") / "shop")
    build_release(Export(threads=1), folder / "artifacts" / "shop", folder / "releases")
    State("r1", "r1", None, True).write(folder / "releases")
    write(folder / "new.csv", era(SECOND_ERA, 8))
    write(folder / "same.csv", era(SECOND_ERA, 8, STEPS[FIRST_ERA]))
    return folder


def everything(folder: Path) -> dict[str, int]:
    """Return every file of a folder with the time of its last change, apart from locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


def options(events: Path, judge_users: int = 60) -> Refresh:
    return Refresh(source=Source(events=events), judge_users=judge_users)


def spoil(retriever: Path) -> None:
    """Reverse a retriever: the least likely item comes first. Its manifest is that of a proper artifact."""
    manifest = read_manifest(retriever, "retriever", "")
    weights = load_file(retriever / WEIGHTS)
    signals = json.loads((retriever / WEIGHTS_FILE).read_text())
    signals["weights"] = {name: -1.0 - weight for name, weight in signals["weights"].items()}
    copy = shutil.copytree(retriever, retriever.with_name("copy"))
    with new_artifact(
        retriever, "retriever", options=manifest.options, inputs=manifest.inputs, facts=dict(manifest.facts)
    ) as new:
        shutil.copytree(copy, new, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        save_file({name: np.ascontiguousarray(-tensor) for name, tensor in weights.items()}, new / WEIGHTS)
        (new / WEIGHTS_FILE).write_text(json.dumps(signals))
    shutil.rmtree(copy)


def test_a_spoilt_candidate_is_refused_and_leaves_everything_as_it_was(released, monkeypatch):
    """The retriever's weights and those of its signals are negated after the training; the habits have not changed.

    Its folder can be looked at. No file of the artifacts and of the releases is touched, nor is one added.
    """
    train = module.train_retriever

    def spoilt(training, work, start):
        metrics = train(training, work, start=start)
        spoil(work / "retriever")
        return metrics

    before = everything(released)
    with monkeypatch.context() as patch:
        patch.setattr(module, "train_retriever", spoilt)
        report = refresh(
            options(released / "same.csv", judge_users=0), released / "artifacts" / "shop", released / "releases"
        )
    assert not report["accepted"]
    (retrieval,) = report["comparisons"]
    assert retrieval["worse"]
    assert retrieval["ndcg"]["high"] < 0
    refused = released / "artifacts" / "shop-refused"
    assert json.loads((refused / "refresh.json").read_text())["accepted"] is False
    shutil.rmtree(refused)
    assert everything(released) == before
    assert State.read(released / "releases") == State("r1", "r1", None, True)


def test_the_refreshed_release_wins_also_after_a_kill(released):
    """The command is killed when the training of the retriever has ended; a second call goes on from there.

    The candidate must win clearly in both stages: the interval is above 0. The second release answers with the new
    habit, every seventh article, and the first one, which is not changed, with the old one.
    """
    artifacts, repository = released / "artifacts" / "shop", released / "releases"
    before = everything(released)
    words = ["refresh", f"--artifacts={artifacts}", f"--repository={repository}", f"--events={released / 'new.csv'}"]
    command = [sys.executable, "-c", CODE, *words, "--judge-users=60"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert any(line.startswith("taking the ranker") for line in process.stderr)
        os.killpg(process.pid, signal.SIGKILL)
    work = artifacts.with_name(".shop.refresh")
    trained = (work / "retriever" / "manifest.json").stat().st_mtime_ns
    report = refresh(options(released / "new.csv"), artifacts, repository)
    folder = artifacts.with_name("shop-2")
    assert (report["accepted"], report["release"], report["promoted"]) == (True, "r2", None)
    assert [row["stage"] for row in report["comparisons"]] == ["retrieval", "ranking"]
    for row in report["comparisons"]:
        assert row["ndcg"]["low"] > 0
        assert row["ndcg"]["candidate"] > 2 * row["ndcg"]["serving"]
    assert (folder / "retriever" / "manifest.json").stat().st_mtime_ns == trained, "not trained again"
    after = everything(released)
    assert {name: after.get(name) for name in before} == before
    assert [row["name"] for row in list_releases(repository)] == ["r1", "r2"]
    habit = ["sku-1", "sku-8", "sku-15"]
    assert ExportedSteps.load(repository, "_r2").recommend(habit)[0][0] == "sku-22"
    assert ExportedSteps.load(repository, "_r1").recommend(["sku-1", "sku-2", "sku-3"])[0][0] == "sku-4"
    check_the_judges_are_unseen(artifacts, folder)


def check_the_judges_are_unseen(artifacts: Path, folder: Path) -> None:
    """Check by the raw log: every judging event is in the new file only, and is the last one of its user."""
    earlier, data = load_data(artifacts), load_data(folder)
    log = pq.read_table(folder / "data" / "interactions.parquet").to_pandas().sort_values("timestamp", kind="stable")
    last = log.groupby("user").last()
    for user, name in enumerate(data.users):
        assert data.catalogue.raw(int(data.test[user])).decode() == last.loc[name, "item"]
        assert last.loc[name, "timestamp"] >= SECOND_ERA
        assert len(data.training[user]) + 2 == len(earlier.training[earlier.users.index(name)]) + 2 + 8


def test_the_command_says_why_nothing_is_released(released, run):
    """A file that holds nothing new, and a release that is gone: exit code 2, one sentence, and nothing is changed."""
    before = everything(released)
    arguments = [
        "refresh",
        *("--artifacts", released / "artifacts" / "shop"),
        *("--repository", released / "releases", "--release", "r1"),
    ]
    code, _, errors = run(*arguments, "--events", released / "shop.csv")
    assert code == 2
    assert re.search(r"error: .*shop.csv has new last events of 0 users, too few", errors)
    code, _, errors = run(*arguments[:-1], "r9", "--events", released / "new.csv")
    assert code == 2
    assert "there is no release 'r9'" in errors
    assert everything(released) == before
