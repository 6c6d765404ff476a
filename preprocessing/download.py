"""Downloads public data sets over HTTP, resuming interrupted downloads and verifying published checksums."""

import hashlib
import http.client
import re
import shutil
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

from preprocessing.errors import InputError
from preprocessing.progress import progress_bar

CHUNK = 1 << 20
TIMEOUT = 60.0
"""Number of seconds without data after which a connection counts as broken."""


class PublicFile(NamedTuple):
    """A file of a public data set."""

    url: str
    md5_url: str | None = None
    """Address of the file's MD5 sum; None if the publisher provides none."""


GROUPLENS = "https://files.grouplens.org/datasets/movielens"
SNAP = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"
EDITIONS = {
    "movielens": ("ml-latest-small", "ml-1m", "ml-10m", "ml-20m", "ml-25m", "ml-32m"),
    "amazon": ("Beauty", "Video_Games", "Toys_and_Games", "Sports_and_Outdoors", "Books", "Electronics"),
}
"""Editions of each data set that can be downloaded. The first is the default, as in the paper; Amazon's are categories
of 2014."""


def public_files(dataset: str, edition: str | None) -> tuple[str, tuple[PublicFile, ...]]:
    """Return the folder name and the files of an edition.

    Raises:
        InputError: the edition does not exist.
    """
    edition = edition or EDITIONS[dataset][0]
    if edition not in EDITIONS[dataset]:
        raise InputError(f"there is no edition {edition!r} of {dataset}: choose one of {', '.join(EDITIONS[dataset])}")
    if dataset == "movielens":
        url = f"{GROUPLENS}/{edition}.zip"
        return edition, (PublicFile(url, None if "latest" in edition else f"{url}.md5"),)
    names = f"ratings_{edition}.csv", f"meta_{edition}.json.gz"
    return f"amazon-2014-{edition.lower()}", tuple(PublicFile(f"{SNAP}/{name}") for name in names)


def download_public(dataset: str, edition: str | None, folder: Path) -> Path:
    """Download a data set's public files into a subfolder of ``folder``, and return that subfolder.

    Files that are already there are not downloaded again.

    Raises:
        InputError: the edition does not exist, or a file cannot be downloaded or does not match the published checksum.
    """
    name, files = public_files(dataset, edition)
    target = folder / name
    if not target.is_dir():
        partial = folder / f".{name}.partial"
        partial.mkdir(parents=True, exist_ok=True)
        for file in files:
            path = download(file, partial)
            if path.suffix == ".zip":
                _unpack(path)
        partial.rename(target)
    return target


def download(file: PublicFile, folder: Path) -> Path:
    """Download one file, and return its path; a partial download is resumed if the server supports it.

    Raises:
        InputError: the file cannot be downloaded or does not match the published checksum.
    """
    path = folder / file.url.rsplit("/", 1)[1]
    if path.is_file():
        return path
    partial = path.with_name(path.name + ".part")
    try:
        _fetch(file.url, partial)
        expected = _published_md5(file.md5_url) if file.md5_url else None
    except (OSError, http.client.HTTPException) as error:  # urllib's errors are OSErrors
        raise InputError(
            f"{file.url} cannot be downloaded ({error}): run the command again to resume, or download it yourself and"
            " set --raw to its folder"
        ) from None
    if expected and (found := _md5(partial)) != expected:
        partial.unlink()
        raise InputError(f"{file.url} has the MD5 sum {found} instead of {expected}: run the command again")
    partial.rename(path)
    return path


def _fetch(url: str, partial: Path) -> None:
    start = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if start and error.code == 416:  # no bytes beyond the partial file, so it is complete
            return
        raise
    with response:
        if response.status != 206:  # the server does not resume, so the download starts again
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        with partial.open("ab" if start else "wb") as out, progress_bar(transient=True) as bar:
            task = bar.add_task(f"fetching {url.rsplit('/', 1)[1]} [KiB]", total=total and total // 1024, note="")
            while chunk := response.read(CHUNK):
                out.write(chunk)
                bar.update(task, completed=out.tell() // 1024)
            if total is not None and out.tell() != total:
                raise ConnectionError(f"the connection broke after {out.tell():,} of {total:,} bytes")


def _published_md5(url: str) -> str:
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        found = re.search(rb"\b[0-9a-f]{32}\b", response.read(4096))
    if not found:
        raise ConnectionError(f"{url} does not contain an MD5 sum")
    return found[0].decode()


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.md5()
        while chunk := file.read(CHUNK):
            digest.update(chunk)
        return digest.hexdigest()


def _unpack(path: Path) -> None:
    """Extract all files of a zip archive directly into the archive's folder, and remove the archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if not member.is_dir():
                    with archive.open(member) as source, (path.parent / Path(member.filename).name).open("wb") as out:
                        shutil.copyfileobj(source, out)
    except zipfile.BadZipFile as error:
        path.unlink()
        raise InputError(f"{path.name} is not a zip file ({error}): run the command to download it again") from None
    path.unlink()
