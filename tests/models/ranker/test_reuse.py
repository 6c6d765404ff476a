"""A ranker that is taken over for another retriever: the model stays, the weight is fitted again."""

import json
from pathlib import Path

import pytest

from export.repository import check_artifacts
from models.ranker.inference.scorer import Runtime
from models.ranker.reuse import ENOUGH_USERS, REUSED, reuse_ranker
from preprocessing.artifacts import read_manifest

RUNTIME = Runtime(dtype="float32", threads=1)


@pytest.fixture
def longer(artifacts: Path, tmp_path: Path) -> Path:
    """Return a folder with data and retriever, and no ranker."""
    for name in ("data", "retriever"):
        (tmp_path / name).symlink_to(artifacts / name)
    return tmp_path


def test_a_taken_over_ranker_is_the_same_model_with_a_weight_of_its_own(artifacts: Path, longer: Path):
    """The tiny ranker has learned nothing and was given weight 0.5; fitted, most of the weight is the retriever's.

    The artifact belongs to data and retriever, and a second call finds it finished.
    """
    metrics = reuse_ranker(artifacts, longer, RUNTIME, candidates=20, users=ENOUGH_USERS)
    assert (metrics["fitted"], metrics["weight_before"]) == (True, 0.5)
    assert metrics["weight"] > 0.7
    assert metrics["validation"]["users"] == ENOUGH_USERS
    manifests = check_artifacts(longer)
    assert manifests["ranker"].inputs[REUSED] == read_manifest(artifacts / "ranker", "ranker", "").fingerprint
    assert json.loads((longer / "ranker" / "fusion.json").read_text())["weight"] == metrics["weight"]
    before, now = (read_manifest(folder / "ranker", "ranker", "").files for folder in (artifacts, longer))
    changed = {name for name in before.keys() & now.keys() if before[name]["sha256"] != now[name]["sha256"]}
    assert changed == {"fusion.json", "metrics.json"}
    assert before.keys() - now.keys() == {"curves.png"}, "the curves are those of a training"
    written = (longer / "ranker" / "manifest.json").stat().st_mtime_ns
    assert reuse_ranker(artifacts, longer, RUNTIME, candidates=20, users=ENOUGH_USERS) == metrics
    assert (longer / "ranker" / "manifest.json").stat().st_mtime_ns == written


def test_with_few_users_the_weight_is_kept(artifacts: Path, longer: Path):
    metrics = reuse_ranker(artifacts, longer, RUNTIME, candidates=20, users=ENOUGH_USERS - 1)
    assert (metrics["fitted"], metrics["weight"], metrics["weight_before"]) == (False, 0.5, 0.5)
