"""The folders of a data set's refreshes: which artifacts a release was built from, and where the next ones go.

``artifacts/shop`` holds the first artifacts, and ``artifacts/shop-2``, ``artifacts/shop-3`` ... those of the refreshes
whose candidates were accepted. A candidate is made in the hidden folder ``artifacts/.shop.refresh``, which is renamed
when it is accepted, or to ``artifacts/shop-refused``.
"""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from export.repository import check_artifacts
from preprocessing.artifacts import read_manifest
from preprocessing.errors import InputError
from serving.layout import KIND, step_artifact


def generations(artifacts: Path) -> list[Path]:
    """Return the artifacts of a data set, the first ones first, then those of each refresh."""
    numbered = [(_number(artifacts, path), path) for path in artifacts.parent.glob("*") if path.is_dir()]
    later = sorted((number, path) for number, path in numbered if number is not None)
    return [path for path in (artifacts, *(path for _, path in later)) if path.is_dir()]


def _number(artifacts: Path, path: Path) -> int | None:
    """Return the number at the end of the name of a refresh's artifacts; None for another folder."""
    found = re.fullmatch(re.escape(artifacts.name) + r"-([1-9]\d{0,8})", path.name)
    return int(found[1]) if found else None


def next_folder(artifacts: Path) -> Path:
    """Return the folder for the artifacts of the next refresh."""
    numbers = [_number(artifacts, path) or 1 for path in generations(artifacts)]
    return artifacts.with_name(f"{artifacts.name}-{max(numbers, default=1) + 1}")


def work_folder(artifacts: Path) -> Path:
    """Return the folder in which a candidate is made."""
    return artifacts.with_name(f".{artifacts.name}.refresh")


def refused_folder(artifacts: Path) -> Path:
    """Return the folder of the candidate that was refused last."""
    return artifacts.with_name(f"{artifacts.name}-refused")


@contextmanager
def only_refresh(artifacts: Path) -> Iterator[None]:
    """Hold the lock of a data set's refreshes; it ends with the process, however that ends.

    Raises:
        InputError: another refresh holds it.
    """
    path = artifacts.with_name(f".{artifacts.name}.refresh.lock")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another refresh of {artifacts} is running: wait until it ends") from None
        yield
    finally:
        os.close(descriptor)


def built_from(artifacts: Path, repository: Path, release: str) -> Path:
    """Return those artifacts of a data set that a release was built from.

    Args:
        artifacts: the first artifacts of the data set.
        repository: repository of releases.
        release: name of the release.

    Raises:
        InputError: none of them, or they were changed since.
    """
    folder = step_artifact(repository, "ranker", f"_{release}")
    inputs = read_manifest(folder, KIND, "llamarec release build").inputs
    found = generations(artifacts)
    for path in reversed(found):
        if _fingerprints(path) == dict(inputs):
            return path
    raise InputError(
        f"release {release} was built from none of {', '.join(map(str, found))}: name the first artifacts of its data"
        " set, and keep those that it was built from"
    )


def _fingerprints(artifacts: Path) -> dict[str, str] | None:
    """Return the fingerprints of data, retriever and ranker; None if they are incomplete."""
    try:
        return {kind: manifest.fingerprint for kind, manifest in check_artifacts(artifacts).items()}
    except InputError:
        return None
