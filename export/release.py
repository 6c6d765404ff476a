"""`llamarec release build`: the artifacts as an immutable, named set of models that can be promoted while serving."""

import json
import os
import py_compile
import shutil
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from export.repository import Export, check_artifacts, export
from llamarec_client.contract import ENSEMBLE, RETRIEVAL_ENSEMBLE
from preprocessing.artifacts import sha256, write_whole
from preprocessing.data import load_data
from preprocessing.errors import InputError
from serving.offline import ExportedSteps
from serving.server.releases import NAME, RELEASES, list_releases, manifest_path

PROBES = 3
"""Users of the data set whose served answers must come back before the release is promoted."""
RESERVED = {"canary", "retrieval"}
"""Words behind ``llamarec_`` that name something else."""


def build_release(options: Export, artifacts: Path, repository: Path, name: str | None = None) -> dict[str, Any]:
    """Writes the models of one release into a repository of releases.

    They are made aside and moved in; the manifest, with a hash of every file and the probes' answers, comes last, and
    the release exists once it stands.

    Args:
        options: see :func:`export.repository.export`.
        artifacts: the data set's artifacts.
        repository: of releases; made if it is not there.
        name: by default ``r`` and the next number.

    Returns:
        The manifest.

    Raises:
        InputError: the name is taken or none, or the artifacts are not complete.
    """
    if name is None:
        taken = {row["name"] for row in list_releases(repository)}
        name = next(f"r{number}" for number in range(1, len(taken) + 2) if f"r{number}" not in taken)
    if not NAME.fullmatch(name) or name in RESERVED:
        raise InputError(f"{name!r} is no name for a release: letters, digits, points and hyphens, at most 40")
    if manifest_path(repository, name).exists():
        raise InputError(f"release {name} is built and never changes: choose another name")
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
        manifest["files"] = {
            str(path.relative_to(staging)): sha256(path) for path in sorted(staging.rglob("*")) if path.is_file()
        }
        for folder in sorted(staging.iterdir()):
            target = repository / folder.name
            if target.exists():
                shutil.rmtree(target)  # of a build that was cut short before its manifest
            os.rename(folder, target)
        write_whole(manifest_path(repository, name), json.dumps(manifest, indent=1) + "\n")
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return manifest


def _probes(steps: ExportedSteps, artifacts: Path) -> list[dict[str, Any]]:
    data = load_data(artifacts)
    probes = []
    for user in np.random.default_rng(0).permutation(len(data.users))[:PROBES]:
        history = data.raw_history(int(user))
        answer = steps.recommend(history)
        probes.append({"history": history, "items": [row[0] for row in answer], "scores": [row[1] for row in answer]})
    return probes


def _seal(folder: Path) -> None:
    """No file of a release is written again, by the server neither.

    The Python backend would write its byte code into the version folder, whose new time stamp looks like a new version
    to the next load of anything above it.
    """
    for path in folder.glob("*/1/model.py"):
        py_compile.compile(str(path), doraise=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    for ensemble in (ENSEMBLE, RETRIEVAL_ENSEMBLE):
        for path in folder.glob(f"{ensemble}_*/1"):
            (path / "README").write_text("Triton wants a version folder even of an ensemble.\n", encoding="utf-8")
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o444)
