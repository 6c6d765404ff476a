"""Artifact folders: complete or absent, whatever happens while they are written, and recognised by what made them."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import pairwise

import pytest

from preprocessing.artifacts import MANIFEST, is_finished, link_or_copy, link_weights, new_artifact, read_manifest
from preprocessing.errors import InputError

MADE = {"options": {"seed": 1}, "inputs": {"data": "abc"}}


def write(folder, text, **made):
    with new_artifact(folder, "data", **{**MADE, **made}) as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "file.txt").write_text(text)
    return folder


def test_what_is_written_reads_back(tmp_path):
    """Options, inputs and files are read back with size and hash; FIPS 180-2, B.1 has the SHA-256 of "abc"."""
    manifest = read_manifest(write(tmp_path / "a", "abc"), "data", "")
    assert (dict(manifest.options), dict(manifest.inputs)) == (MADE["options"], MADE["inputs"])
    entry = manifest.files["deep/file.txt"]
    assert entry["bytes"] == 3
    assert entry["sha256"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_equal_content_has_an_equal_fingerprint(tmp_path):
    """The fingerprint depends on the content, not on the options, the time or the path."""
    prints = [
        read_manifest(write(tmp_path / name, text, options={"seed": name}), "data", "").fingerprint
        for name, text in (("a", "one"), ("b", "one"), ("c", "two"))
    ]
    assert prints[0] == prints[1] != prints[2]


def write_half(folder):
    with new_artifact(folder, "data", **MADE) as partial:
        (partial / "half").write_text("half")
        raise RuntimeError


@pytest.mark.parametrize("before", [None, "old"])
def test_an_error_leaves_what_was_there(tmp_path, before):
    """An error leaves no artifact where there was none, the old one where there was one, and no temporary files."""
    folder = tmp_path / "a"
    if before:
        write(folder, before)
    with pytest.raises(RuntimeError):
        write_half(folder)
    assert [path.name for path in tmp_path.iterdir()] == (["a"] if before else [])
    if before:
        read_manifest(folder, "data", "")


@pytest.mark.parametrize("before", [None, "old"])
def test_a_kill_leaves_what_was_there_and_the_next_run_cleans_up(tmp_path, before):
    """SIGKILL in the middle of writing stands for a machine that stops without warning."""
    folder = tmp_path / "a"
    if before:
        write(folder, before)
    code = (
        "import os, signal, sys; from pathlib import Path; from preprocessing.artifacts import new_artifact\n"
        "with new_artifact(Path(sys.argv[1]), 'data', options={}, inputs={}) as partial:\n"
        "    (partial / 'half').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(folder)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert folder.exists() == bool(before)
    if before:
        assert (folder / "deep" / "file.txt").read_text() == "old"
        read_manifest(folder, "data", "")
    write(folder, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (folder / "deep" / "file.txt").read_text() == "new"


def test_finished_means_made_by_the_same(tmp_path):
    """With other options or inputs, a changed file, or no manifest at all, the artifact is not finished."""
    folder = write(tmp_path / "a", "abc")
    assert is_finished(folder, "data", **MADE)
    assert not is_finished(folder, "data", **{**MADE, "options": {"seed": 2}})
    assert not is_finished(folder, "data", **{**MADE, "inputs": {}})
    assert not is_finished(folder, "retriever", **MADE)
    (folder / "deep" / "file.txt").write_text("abcd")
    assert not is_finished(folder, "data", **MADE)
    assert not is_finished(tmp_path / "absent", "data", **MADE)


def test_what_is_no_artifact_is_refused_with_the_command(tmp_path):
    """The folder is absent, is of another kind, lacks one of its files, or has a manifest that cannot be read."""
    with pytest.raises(InputError, match=r"does not exist or is not finished: run `llamarec preprocess` first"):
        read_manifest(tmp_path / "a", "data", "llamarec preprocess")
    folder = write(tmp_path / "a", "abc")
    with pytest.raises(InputError, match=r"holds a 'data' artifact.*not 'ranker'"):
        read_manifest(folder, "ranker", "llamarec train-ranker")
    (folder / "deep" / "file.txt").unlink()
    with pytest.raises(InputError, match=r"file.txt is missing or was changed: delete"):
        read_manifest(folder, "data", "llamarec preprocess")
    for text in ("{", json.dumps({"format": 1}), "[]"):
        (folder / MANIFEST).write_text(text)
        with pytest.raises(InputError, match="cannot be read as a manifest"):
            read_manifest(folder, "data", "llamarec preprocess")


def test_weights_take_their_place_on_the_disk_once(tmp_path):
    """Three folders have one file of weights, and three of everything else; replaced in one, it stays in the others."""
    folders = [tmp_path / name for name in "abc"]
    folders[0].mkdir()
    (folders[0] / "model.safetensors").write_bytes(b"weights")
    (folders[0] / "config.json").write_text("{}")
    for source, target in pairwise(folders):
        shutil.copytree(source, target, copy_function=link_weights)
    assert len({path.stat().st_ino for path in tmp_path.rglob("*") if path.is_file()}) == 1 + 3
    assert not any((folder / "model.safetensors").stat().st_mode & 0o222 for folder in folders)
    (tmp_path / "new").write_bytes(b"others")
    os.replace(tmp_path / "new", folders[0] / "model.safetensors")
    assert [(folder / "model.safetensors").read_bytes() for folder in folders] == [b"others", b"weights", b"weights"]


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_a_file_system_without_hard_links_gets_copies(tmp_path, monkeypatch, number):
    """The link may be refused because it would cross file systems, or because they have none, or too many of a file."""

    def refused(*given):
        raise OSError(number, os.strerror(number))

    (tmp_path / "a").write_bytes(b"weights")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    link_or_copy(tmp_path / "link", tmp_path / "b")
    assert (tmp_path / "b").samefile(tmp_path / "a")
    assert not (tmp_path / "b").is_symlink()
    monkeypatch.setattr(os, "link", refused)
    link_or_copy(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == b"weights"
    assert not (tmp_path / "c").samefile(tmp_path / "a")
