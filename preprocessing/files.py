"""Finds the files of raw data, and opens them whatever their compression."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import IO
from urllib.parse import unquote

import pyarrow as pa

from preprocessing.errors import InputError

PARQUET = (".parquet", ".parq", ".pq")
CSV = (".csv", ".tsv", ".tab")
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".zstd": "zstd", ".lz4": "lz4"}
"""Compressions by the end of a file's name."""
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}
"""Compressions by the first bytes of a file."""
NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"
"""Name that Hive and Spark give the partition of a null."""


def plain_name(path: Path) -> str:
    """Return a file's name in lower case without the end that names its compression."""
    name = path.name.lower()
    return name.removesuffix(path.suffix.lower()) if path.suffix.lower() in COMPRESSIONS else name


def compressed_names(name: str) -> list[str]:
    """Return the names under which a file may be stored, the plain one first."""
    return [name, *(name + end for end in COMPRESSIONS)]


def is_parquet(path: Path) -> bool:
    """Return whether a file is Parquet by its name or by its first bytes."""
    return plain_name(path).endswith(PARQUET) or _start(path) == b"PAR1"


def compression_of(path: Path) -> str | None:
    """Return a file's compression by its first bytes, or by its name if these are no known ones; None for a plain file.

    Raises:
        InputError: the file is a zip archive.
    """
    start = _start(path)
    if start == b"PK\x03\x04":
        raise InputError(f"{path} is a zip archive or a spreadsheet; unpack it, or save it as CSV, first")
    found = next((name for magic, name in MAGIC.items() if start.startswith(magic)), None)
    return found or COMPRESSIONS.get(path.suffix.lower())


def format_of(path: Path) -> str:
    """Return the format and the compression of a readable file in words, such as ``CSV, gzip``."""
    if is_parquet(path):
        return "Parquet"
    name = plain_name(path)
    kind = "JSON lines" if name.endswith((".json", ".jsonl")) else "CSV" if name.endswith(CSV) else "text"
    compression = compression_of(path)
    return f"{kind}, {compression}" if compression else kind


def open_bytes(path: Path) -> pa.NativeFile:
    """Return a stream of a file's decompressed bytes."""
    return pa.input_stream(str(path), compression=compression_of(path))


def open_text(path: Path) -> IO[str]:
    """Return a decompressed file as UTF-8 text, with or without a byte order mark."""
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="")


def visible_files(folder: Path) -> list[Path]:
    """Return all files below a folder in the order of their names, except hidden ones.

    Hidden are files and folders that begin with a dot (``._log.parquet``, ``.ipynb_checkpoints``) and, as for Spark,
    those that begin with an underscore (``_SUCCESS``, ``_metadata``, ``_delta_log``) and are no partition (``_k=1``).
    """
    return _visible(folder, (folder.resolve(),))


def _visible(folder: Path, above: tuple[Path, ...]) -> list[Path]:
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or (path.name.startswith("_") and "=" not in path.name):
            continue
        if not path.is_dir():
            found.append(path)
        elif (target := path.resolve()) not in above:  # a link to a folder that it is in would never end
            found += _visible(path, (*above, target))
    return found


def partition_keys(path: Path, folder: Path) -> Mapping[str, str | None]:
    """Return the keys and values in the names of the folders between ``folder`` and a file: ``year=2023`` of Hive."""
    parts = path.parent.relative_to(folder).parts if path.parent.is_relative_to(folder) else ()
    keys = dict(part.split("=", 1) for part in parts if "=" in part)
    return {unquote(key): None if value == NO_PARTITION else unquote(value) for key, value in keys.items()}


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4)
