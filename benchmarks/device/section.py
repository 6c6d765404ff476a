"""What every section of the device checks is given, and the file that its findings go to."""

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.device import torch_device
from models.ranker.base import EMBEDDED, find_base
from preprocessing.artifacts import replacing
from preprocessing.data import Data, load_data
from preprocessing.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""
ARTIFACTS = ROOT / "artifacts" / "movielens-100k"
MEMORY = Path("/dev/shm")
TWO_7B_BYTES = 30 << 30


@dataclass(frozen=True)
class Section:
    """The inputs of a section, and its findings."""

    result: Path
    """File for the findings. It is written anew after each of them, so that a section that is stopped loses none."""
    work: Path
    """Folder for weights; a 7B model and its merged copy take 28 GB."""
    bases: Path
    """Folder with the converted embedded base."""
    artifacts: Path
    """Folder with the data and the retriever of a data set."""
    dry_run: bool
    """Whether to run with tiny shapes on the processor."""
    findings: dict[str, Any] = field(default_factory=dict)

    def record(self, name: str, value: Any) -> None:
        """Add a finding, any JSON value, and write all of them."""
        self.findings[name] = value
        with replacing(self.result) as partial:
            partial.write_text(json.dumps(self.findings, indent=1) + "\n", encoding="utf-8")

    @property
    def device(self) -> str:
        """PyTorch's name of the device: the first GPU, or the processor in a dry run.

        Raises:
            InputError: there is no GPU.
        """
        return "cpu" if self.dry_run else torch_device("gpu")

    def embedded_base(self) -> Path:
        """Return the folder of the embedded base model, which the first call converts."""
        return find_base(EMBEDDED, self.bases)

    def exported(self, variant: str) -> tuple[Path, Path]:
        """Return the folders for a variant's artifacts and for its model repository."""
        return self.work / f"{variant}-artifacts", self.work / f"{variant}-repository"

    def data(self) -> Data:
        """Return the data set of ``artifacts``.

        Raises:
            InputError: the folder has none.
        """
        if not (self.artifacts / "data").is_dir():
            raise InputError(
                f"{self.artifacts} holds no data set: run `llamarec preprocess` and `llamarec train-retriever` there,"
                " or name another folder with --artifacts"
            )
        return load_data(self.artifacts)


def default_work() -> Path:
    """Return the folder for weights: in memory if there is room for two 7B models, else among the temporary files."""
    room = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free >= TWO_7B_BYTES
    return (MEMORY if room else Path(tempfile.gettempdir())) / "llamarec-device"


def add_section_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of which :func:`section_of` makes a section."""
    parser.add_argument(
        "--work",
        type=Path,
        default=default_work(),
        help="Folder for weights. Default: in /dev/shm if two 7B models fit there, else a temporary one.",
    )
    parser.add_argument(
        "--bases", type=Path, default=ROOT / "artifacts" / "base", help="Folder for the converted embedded base."
    )
    parser.add_argument("--artifacts", type=Path, default=ARTIFACTS, help="Folder with a data set and its retriever.")
    parser.add_argument(
        "--dry-run", action="store_true", help="Run the same code with tiny shapes on the processor, in seconds."
    )


def section_of(description: str, arguments: Sequence[str] | None = None, *choices: str) -> tuple[Section, str]:
    """Return a section of the command line, with the findings that its file already holds, and its chosen variant.

    Args:
        description: help text of the program.
        arguments: the command line; by default that of this process.
        choices: names of variants, one of which is a positional argument; none if the section has no variants.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if choices:
        parser.add_argument("variant", choices=choices)
    add_section_options(parser)
    parser.add_argument("--result", type=Path, required=True, help="JSON file for the findings.")
    given = parser.parse_args(arguments)
    found = json.loads(given.result.read_text(encoding="utf-8")) if given.result.exists() else {}
    section = Section(given.result, given.work, given.bases, given.artifacts, given.dry_run, found)
    return section, getattr(given, "variant", "")
