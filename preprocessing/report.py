"""Records what was read and what was left out, and stops at the first bad line unless these are to be skipped."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preprocessing.errors import InputError

MOST_NAMES = 10
"""Number of files that a report names one by one; more are grouped by their folders."""
LONGEST_EXAMPLE = 60
"""Maximum number of characters of a bad value in an error message."""


@dataclass
class FileRecord:
    """What was read from one file."""

    format: str
    """Format and compression in words."""
    rows: int = 0
    """Number of usable rows."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Number of skipped lines by what is wrong with them."""


@dataclass
class ReadingLog:
    """Record of a run's files, skipped lines and dropped titles."""

    skip: bool = False
    """Whether bad lines are skipped and counted, instead of stopping at the first."""
    files: dict[Path, FileRecord] = field(default_factory=dict)
    """Record of each file, in the order of reading."""
    titles: Counter[str] = field(default_factory=Counter)
    """Number of dropped titles by what is wrong with them."""

    def begin(self, path: Path, kind: str) -> None:
        """Add a file."""
        self.files[path] = FileRecord(kind)

    def rows(self, path: Path, count: int) -> None:
        """Count usable rows of a file."""
        self.files[path].rows += count

    def bad(self, path: Path, place: Callable[[], str], problem: str, *example: Any, count: int = 1) -> None:
        """Count bad lines, or stop.

        Args:
            path: the file.
            place: function that names the first of the lines, such as "line 3".
            problem: what is wrong with them, as the object of "has".
            example: the first of the bad values, for the error message.
            count: number of lines.

        Raises:
            InputError: bad lines are not skipped.
        """
        if not self.skip:
            shown = f" ({shortened(example[0])})" if example else ""
            raise InputError(f"{path}: {place()} has {problem}{shown}; fix the file or use --skip-bad-lines")
        self.files[path].skipped[problem] += count

    def skipped(self) -> dict[Path, int]:
        """Return the number of skipped lines of each file that has any."""
        return {path: record.skipped.total() for path, record in self.files.items() if record.skipped}

    def report(self, folder: Path | None) -> list[dict[str, Any]]:
        """Return the files, grouped if they are many, with their rows and what was skipped.

        Args:
            folder: the folder that the names are relative to.
        """
        groups = grouped([_relative(path, folder) for path in self.files])
        found: dict[str, dict[str, Any]] = {}
        for name, record in zip(groups, self.files.values(), strict=True):
            group = found.setdefault(name, {"path": name, "format": set(), "files": 0, "rows": 0, "skipped": Counter()})
            group["format"].add(record.format)
            group["files"] += 1
            group["rows"] += record.rows
            group["skipped"] += record.skipped
        return [
            {**group, "format": "; ".join(sorted(group["format"])), "skipped": dict(group["skipped"])}
            for group in found.values()
        ]


def relative_names(paths: Iterable[Path], folder: Path | None) -> list[str]:
    """Return the names of files relative to a folder, grouped by their folders if they are many."""
    return sorted(set(grouped([_relative(path, folder) for path in paths])))


def grouped(paths: list[Path]) -> list[str]:
    """Return a name for each file: its own, or ``folder/*`` where there are more than :data:`MOST_NAMES`."""
    if len(set(paths)) <= MOST_NAMES:
        return [path.as_posix() for path in paths]
    folders = [path.parent for path in paths]
    while len(set(folders)) > MOST_NAMES:
        deepest = max(len(folder.parts) for folder in folders)
        folders = [folder.parent if len(folder.parts) == deepest else folder for folder in folders]
    return [(folder / "*").as_posix() for folder in folders]


def shortened(value: Any) -> str:
    """Return a value as it is written in Python, cut at :data:`LONGEST_EXAMPLE` characters."""
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    shown = repr(value)
    return shown if len(shown) <= LONGEST_EXAMPLE else f"{shown[:LONGEST_EXAMPLE]}..."


def _relative(path: Path, folder: Path | None) -> Path:
    return path.relative_to(folder) if folder and path != folder and path.is_relative_to(folder) else Path(path.name)


def sentences(report: Mapping[str, Any]) -> list[str]:
    """Return the lines of a report for a person to read.

    Args:
        report: ``facts["reading"]`` in the manifest of a data artifact.
    """
    lines = []
    for entry in report["files"]:
        many = f"{entry['files']:,} files, " if entry["files"] > 1 else ""
        lines.append(f"read {entry['path']} ({many}{entry['format']}): {entry['rows']:,} rows")
        lines += [f"  skipped {count:,} with {problem}" for problem, count in entry["skipped"].items()]
    if report["unread"]:
        lines.append(f"not read: {', '.join(report['unread'])}")
    times = report["times"]
    lines.append(f"times: {times['read_as']}, from {times['first']} to {times['last']}")
    titles = report["titles"]
    lines.append(f"titles: {titles['items']:,} items")
    lines += [f"  dropped {count:,}: {problem}" for problem, count in titles["dropped"].items()]
    if titles.get("added"):
        lines.append(f"  {titles['added']:,} of them from the store of added items")
    if titles.get("grouped"):
        lines.append(f"  {titles['grouped']:,} of them have a group")
    if titles["several"]:
        lines.append(f"  {titles['several']:,} items have several titles: the first in alphabetical order is used")
    lines += [f"dropped {count:,} interactions {problem}" for problem, count in report["dropped"].items() if count]
    return lines
