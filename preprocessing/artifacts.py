"""Reads and writes artifact folders.

A folder is written under another name and then renamed, so that it is either complete or absent. Its manifest records
what it was made from.
"""

import glob
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from preprocessing.errors import InputError

MANIFEST = "manifest.json"
FORMAT = 1
WEIGHTS = ".safetensors"
"""End of the names of weights."""
RECORDED_VERSIONS = ("llamarec", "numpy", "nvtabular", "onnxruntime", "peft", "bitsandbytes", "torch", "transformers")


@dataclass(frozen=True)
class Manifest:
    """Record of an artifact's origin and content."""

    kind: str
    """``data``, ``retriever``, ``ranker``, ``base``, ``release``, ``recommendations`` or ``gpu-bundle``."""
    options: Mapping[str, Any]
    """Options that the artifact was made with."""
    inputs: Mapping[str, str]
    """Fingerprint of each artifact or file that this one was made from."""
    facts: Mapping[str, Any]
    """Row counts and other figures that are useful without opening the files."""
    files: Mapping[str, Mapping[str, Any]]
    """``{path: {"bytes": n, "sha256": hex}}`` for every file, relative to the folder."""
    fingerprint: str
    """Hash of the kind and of every file's content; equal only for equal artifacts."""
    versions: Mapping[str, str]
    """Versions of Python and of the packages that made the artifact."""


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


def file_fingerprint(path: Path) -> str:
    """Return a hash of a file's content, or of all files in a folder, for the ``inputs`` of a manifest."""
    if path.is_file():
        return sha256(path)
    names = sorted(file for file in path.rglob("*") if file.is_file())
    return hashlib.sha256("".join(f"{file.relative_to(path)} {sha256(file)}\n" for file in names).encode()).hexdigest()


def plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mapping as it would be read back from JSON, so that stored and given options compare equal."""
    plain: dict[str, Any] = json.loads(json.dumps(value, sort_keys=True, default=str))
    return plain


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in RECORDED_VERSIONS:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path`` that replaces it when the block ends without an error.

    A reader therefore sees the complete old file or the complete new one. The folder is created if it is absent.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file through :func:`replacing`."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def link_or_copy(source: Path, target: Path) -> None:
    """Make a new path another name of the same file, or of a copy where the file system cannot do that.

    The file is made read-only: writing into it would change it under all of its names. To change it under one of them,
    write another file and rename that, as :func:`replacing` does.
    """
    file = source.resolve()
    try:
        file.chmod(file.stat().st_mode & ~0o222)
        os.link(file, target)
    except OSError:  # on another file system, or a file of another user
        shutil.copy2(file, target)


def link_weights(source: str, target: str) -> None:
    """Copy a file, but only link weights: safetensors files, which may have gigabytes; see :func:`link_or_copy`.

    It is a ``copy_function`` of ``shutil.copytree``.
    """
    if source.endswith(WEIGHTS):
        link_or_copy(Path(source), Path(target))
    else:
        shutil.copy2(source, target)


@contextmanager
def new_artifact(
    folder: Path,
    kind: str,
    *,
    options: Mapping[str, Any],
    inputs: Mapping[str, str],
    facts: dict[str, Any] | None = None,
) -> Iterator[Path]:
    """Yield an empty folder to fill, which replaces ``folder`` when the block ends without an error.

    Args:
        folder: the artifact's folder; an older artifact there is replaced.
        kind: see :class:`Manifest`.
        options: options that the artifact is made with, anything that JSON can hold.
        inputs: fingerprints of the artifacts and files that it is made from.
        facts: figures for the manifest; the block may add entries.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for stale in folder.parent.glob(f".{glob.escape(folder.name)}.*"):
        shutil.rmtree(stale)  # left by a killed run
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir()
    try:
        yield partial
        paths = [path for path in partial.rglob("*") if path.is_file()]
        write_manifest(partial, kind, paths, options=options, inputs=inputs, facts=facts or {})
        if folder.exists():
            replaced = folder.with_name(f".{folder.name}.replaced")
            os.rename(folder, replaced)
            os.rename(partial, folder)
            shutil.rmtree(replaced)
        else:
            os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_manifest(
    folder: Path,
    kind: str,
    paths: Iterable[Path],
    *,
    options: Mapping[str, Any],
    inputs: Mapping[str, str],
    facts: Mapping[str, Any],
) -> None:
    """Write the manifest of an artifact whose files are already in its folder, see :func:`new_artifact`.

    Args:
        folder: the artifact's folder.
        kind: see :class:`Manifest`.
        paths: its files, in any order.
        options: see :func:`new_artifact`.
        inputs: see :func:`new_artifact`.
        facts: see :func:`new_artifact`.
    """
    paths = sorted(paths)
    files = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths}
    content = "".join(f"{name} {entry['sha256']}\n" for name, entry in files.items())
    manifest = {
        "format": FORMAT,
        "kind": kind,
        "fingerprint": hashlib.sha256(f"{kind}\n{content}".encode()).hexdigest(),
        "options": plain(options),
        "inputs": dict(inputs),
        "facts": plain(facts),
        "versions": _versions(),
        "files": files,
    }
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def read_manifest(folder: Path, kind: str, remedy: str) -> Manifest:
    """Return the manifest of an artifact that must exist.

    Args:
        folder: the artifact's folder.
        kind: kind that the artifact must have.
        remedy: command that makes the artifact, for the error message.

    Raises:
        InputError: the folder is missing, is not an artifact of that kind, or lacks one of its files.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder} does not exist or is not finished: run `{remedy}` first")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        made_by = raw.pop("format")
        manifest = Manifest(**raw)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} cannot be read as a manifest ({error}): delete {folder} and run `{remedy}`") from None
    if made_by != FORMAT or manifest.kind != kind:
        raise InputError(f"{folder} holds a {manifest.kind!r} artifact, format {made_by}, not {kind!r}: run `{remedy}`")
    for name, entry in manifest.files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            raise InputError(f"{file} is missing or was changed: delete {folder} and run `{remedy}`")
    return manifest


def is_finished(folder: Path, kind: str, *, options: Mapping[str, Any], inputs: Mapping[str, str]) -> bool:
    """Return whether ``folder`` already holds the artifact that these options and inputs would make."""
    try:
        manifest = read_manifest(folder, kind, remedy="")
    except InputError:
        return False
    return manifest.options == plain(options) and dict(manifest.inputs) == dict(inputs)
