"""Builds a release: the artifacts as an immutable, named set of models that can be promoted on a running server."""

import json
import os
import shutil
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from export.config import read_serving
from export.repository import PASS_FILE, Export, check_artifacts, export, write_store_models
from llamarec_client.contract import ENSEMBLE, RETRIEVAL_ENSEMBLE, SIMILAR
from preprocessing.artifacts import MANIFEST, read_manifest, sha256, write_whole
from preprocessing.data import load_data
from preprocessing.errors import InputError
from serving.layout import KIND, step_artifact
from serving.offline import ExportedSteps
from serving.policy import Policy
from serving.server.releases import NAME, RELEASES, list_releases, manifest_path
from serving.server.stand_in import compile_models

PROBES = 3
"""Number of users whose answers are recorded; the server must reproduce them before the release is promoted."""
RESERVED = {"canary", "retrieval"}
"""Names that no release may have, because ``llamarec_<name>`` is another model."""


def build_release(options: Export, artifacts: Path, repository: Path, name: str | None = None) -> dict[str, Any]:
    """Write the models of one release into a repository of releases.

    The models are built in a temporary folder and then moved. The manifest, with a hash of every file and the answers
    to the probes, is written last; the release exists once it does.

    Args:
        options: see :func:`export.repository.export`.
        artifacts: the data set's artifacts.
        repository: repository of releases; created if it does not exist.
        name: name of the release. Default: ``r`` and the next number.

    Returns:
        The manifest.

    Raises:
        InputError: the name is taken or invalid, or the artifacts are incomplete.
    """
    name = name or next_name(repository)
    if not NAME.fullmatch(name) or name in RESERVED:
        raise InputError(f"{name!r} is not a valid release name: use at most 40 letters, digits, points and hyphens")
    if manifest_path(repository, name).exists():
        raise InputError(f"release {name} already exists and never changes: choose another name")
    check_artifacts(artifacts)
    staging = repository / RELEASES / f".{name}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    suffix = f"_{name}"
    try:
        release = export(options, artifacts, staging, suffix=suffix)
        data = load_data(artifacts)
        manifest: dict[str, Any] = {
            "name": name,
            "release": release,
            "dataset": data.name,
            "built": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "probes": _probes(ExportedSteps.load(staging, suffix), artifacts),
        }
        _seal(staging)
        digests = _recorded_digests(staging)
        manifest["files"] = {
            str(path.relative_to(staging)): digests.get(path) or sha256(path)
            for path in sorted(staging.rglob("*"))
            if path.is_file()
        }
        for folder in sorted(staging.iterdir()):
            target = repository / folder.name
            if target.exists():
                shutil.rmtree(target)  # left by a build that was interrupted before its manifest
            os.rename(folder, target)
        write_store_models(repository, options.serving)
        write_whole(manifest_path(repository, name), json.dumps(manifest, indent=1) + "\n")
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return manifest


def next_name(repository: Path) -> str:
    """Return the name that the next release gets by default: ``r`` and the first number that is free."""
    taken = {row["name"] for row in list_releases(repository)}
    return next(f"r{number}" for number in range(1, len(taken) + 2) if f"r{number}" not in taken)


def release_options(repository: Path, name: str) -> Export:
    """Return the options that a release was built with, so that the next one is served in the same way.

    Args:
        repository: repository of releases.
        name: name of the release.

    Raises:
        InputError: the release's files are incomplete.
    """
    suffix = f"_{name}"
    folder = step_artifact(repository, "ranker", suffix)
    recorded = read_manifest(folder, KIND, "llamarec release build").options
    passed = json.loads((folder / PASS_FILE).read_text(encoding="utf-8"))["seconds"]
    serving = read_serving(repository, suffix, passed)
    runtime = {"forward": "auto", "batching": "exact", **recorded["runtime"]}  # earlier versions had neither
    return Export(
        backend=runtime["runtime"],
        dtype=runtime["dtype"],
        threads=runtime["threads"],
        forward=None if runtime["forward"] == "auto" else runtime["forward"],
        batching=runtime["batching"],
        device=serving.device,
        index=recorded["index"],
        retrieve=recorded.get("retrieve"),
        policy=Policy.of(recorded.get("policy", {})),
        serving=serving,
    )


def _recorded_digests(staging: Path) -> dict[Path, str]:
    """Return the hashes of the steps' files, which the export has just computed: weights take long to read again."""
    return {
        path.parent / name: entry["sha256"]
        for path in staging.glob(f"*/1/*/{MANIFEST}")
        for name, entry in json.loads(path.read_text(encoding="utf-8"))["files"].items()
    }


def _probes(steps: ExportedSteps, artifacts: Path) -> list[dict[str, Any]]:
    data = load_data(artifacts)
    probes = []
    for user in np.random.default_rng(0).permutation(len(data.users))[:PROBES]:
        history = data.raw_history(int(user))
        answer = steps.recommend(history)
        probes.append({"history": history, "items": [row[0] for row in answer], "scores": [row[1] for row in answer]})
    return probes


def _seal(folder: Path) -> None:
    """Compile every ``model.py`` of a release, and make its files read-only."""
    compile_models(folder)
    for ensemble in (ENSEMBLE, RETRIEVAL_ENSEMBLE, SIMILAR):
        for path in folder.glob(f"{ensemble}_*/1"):
            (path / "README").write_text("Triton requires a version folder even for an ensemble.\n", encoding="utf-8")
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o444)
