"""The two data sets of the published experiments, and the folder that holds their raw files."""

import argparse
import os
from pathlib import Path

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
