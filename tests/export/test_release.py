"""Releases: what can be read back of how one was built."""

from dataclasses import asdict
from pathlib import Path

import pytest

from export.config import Serving
from export.release import build_release, release_options
from export.repository import Export
from preprocessing.artifacts import sha256
from serving.policy import Policy


@pytest.mark.thorough
def test_the_next_release_can_be_built_as_the_last_one(artifacts: Path, tmp_path: Path):
    """Every option that was given is read back from the release's files; the others are what the export chose."""
    given = Export(
        backend="torch",
        dtype="float32",
        threads=1,
        device="cpu",
        retrieve=10,
        forward="packed",
        batching="tolerant",
        policy=Policy(boosts={"50": 2.0}, repeats=3),
        serving=Serving(rank_cache=3, queue_seconds=4.0),
    )
    manifest = build_release(given, artifacts, tmp_path / "releases")
    weights = next(file for file in manifest["files"] if file.endswith("model.safetensors"))
    trained = artifacts / "ranker" / "merged" / "model.safetensors"
    assert (tmp_path / "releases" / weights).samefile(trained)  # one file on the disk, not three
    assert all(sha256(tmp_path / "releases" / file) == digest for file, digest in manifest["files"].items())
    found = asdict(release_options(tmp_path / "releases", "r1"))
    serving = found.pop("serving")
    assert found == {name: value for name, value in asdict(given).items() if name != "serving"}
    assert (serving["rank_cache"], serving["queue_seconds"]) == (3, 4.0)
