"""The two data sets of the published experiments, and the folder that holds their raw files."""

import argparse
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from preprocessing.artifacts import is_finished, new_artifact, read_manifest
from preprocessing.catalogue import ITEMS_FILE, Catalogue
from preprocessing.data import KIND, SEQUENCES_FOLDER, STATISTICS_FILE, TYPES
from preprocessing.errors import InputError
from preprocessing.preprocess import Preprocessing

ROOT = Path(__file__).resolve().parents[1]
"""The repository."""
OPTION, VARIABLE = "--data", "LLAMAREC_DATA"
DEFAULT = ROOT / "../shared/data"
SOURCES = {"ml-latest-small": "movielens", "amazon-2014-beauty": "amazon"}
"""The layout of the raw files, a name of :data:`preprocessing.sources.SOURCES`, by the name of their folder."""


def add_data_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--data``, which :func:`data_folder` resolves."""
    parser.add_argument(
        OPTION,
        type=Path,
        metavar="DIR",
        help=f"Folder with the raw data sets {' and '.join(SOURCES)}."
        f" Default: the environment variable {VARIABLE}, or else ../shared/data relative to the repository.",
    )


def add_work_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--work``, the folder in which an experiment keeps what is not committed."""
    parser.add_argument(
        "--work", type=Path, default=ROOT / "artifacts" / "results", help="Folder for data, weights and checkpoints."
    )


def write_derived(
    whole: Path, folder: Path, made_with: Mapping[str, Any], columns: Mapping[str, Any], catalogue: Catalogue
) -> None:
    """Write ``folder/data``, a data set that an experiment derives from ``whole/data``.

    Args:
        whole: folder that holds the preprocessed data.
        folder: folder to write into.
        made_with: options of the derivation.
        columns: the columns of the sequences.
        catalogue: the items.
    """
    manifest = read_manifest(whole / "data", KIND, "llamarec preprocess")
    inputs, facts = {"data": manifest.fingerprint}, dict(manifest.facts)
    with new_artifact(folder / "data", KIND, options=made_with, inputs=inputs, facts=facts) as new:
        (new / SEQUENCES_FOLDER).mkdir()
        pq.write_table(pa.table(dict(columns), pa.schema(TYPES)), new / SEQUENCES_FOLDER / "part_0.parquet")
        catalogue.write(new / ITEMS_FILE)
        shutil.copy(whole / "data" / STATISTICS_FILE, new)


def is_derived(whole: Path, folder: Path, made_with: Mapping[str, Any]) -> bool:
    """Return whether :func:`write_derived` has already written this data set."""
    manifest = read_manifest(whole / "data", KIND, "llamarec preprocess")
    return is_finished(folder / "data", KIND, options=made_with, inputs={"data": manifest.fingerprint})


def data_folder(given: Path | None) -> Path:
    """Return the folder with the raw data sets: the given one, that of ``LLAMAREC_DATA``, or ``../shared/data``.

    Raises:
        InputError: the folder does not exist.
    """
    folder = given or Path(os.environ.get(VARIABLE) or DEFAULT)
    if not folder.is_dir():
        raise InputError(
            f"{os.path.normpath(folder)} does not exist: name the folder that holds {' and '.join(SOURCES)}"
            f" with {OPTION} DIR or in the environment variable {VARIABLE}"
        )
    return folder


def preprocessing_of(dataset: str, data: Path) -> Preprocessing:
    """Return how the data set of that name in the folder ``data`` is preprocessed, as in the paper."""
    return Preprocessing(dataset=SOURCES[dataset], raw=data / dataset)
