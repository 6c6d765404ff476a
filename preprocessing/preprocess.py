"""The data stage: turns raw events and titles into sequences, items and vocabulary (paper, section 4.0.1)."""

import hashlib
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from preprocessing.append import load_previous, write_added
from preprocessing.artifacts import file_fingerprint, is_finished, new_artifact, read_manifest
from preprocessing.catalogue import ITEMS_FILE, Catalogue
from preprocessing.cluster import connected
from preprocessing.data import (
    ADDED_FILE,
    INTERACTIONS_FILE,
    KIND,
    SEQUENCES_FOLDER,
    STATISTICS_FILE,
    Statistics,
    read_sequences,
)
from preprocessing.download import EDITIONS, download_public
from preprocessing.errors import InputError
from preprocessing.files import visible_files
from preprocessing.ingest import Raw, RawTables, ingest
from preprocessing.progress import progress_bar
from preprocessing.report import ReadingLog, relative_names
from preprocessing.sources import SOURCES, Layout, raw_files, separator

WORKFLOW_FOLDER = "workflow"
STEPS = 5
ADDED_INPUT = "added items"
"""Name of the added titles among the inputs of the manifest."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Options of the data stage."""

    dataset: str = "movielens-100k"
    """Kind of raw data, a key of :data:`preprocessing.sources.SOURCES`."""
    raw: Path | None = None
    """Raw file or folder, required for a ``table``. If absent, ``movielens-100k`` is read from an installed package,
    and ``movielens`` and ``amazon`` are downloaded."""
    edition: str | None = None
    """Edition to download, one of :data:`preprocessing.download.EDITIONS`; the first one if absent."""
    minimum: int = 5
    """Minimum number of interactions of every user and every item that is kept (k of the k-core)."""
    user_column: str = "user"
    """Name of the column of user ids in a ``table``."""
    item_column: str = "item"
    """Name of the column of item ids in a ``table``."""
    timestamp_column: str = "timestamp"
    """Name of the column of timestamps in a ``table``."""
    title_column: str = "title"
    """Name of the column of item titles in a ``table``."""
    group_column: str | None = None
    """Name of the column or field with the group of each item, for policies; if absent, the items have none. MovieLens
    has ``genres``, of which the first counts, and Amazon's metadata for example ``brand`` or ``categories``."""
    delimiter: str | None = None
    """Separator of the fields in the text files of a ``table``, one character or ``tab``; if absent, a tab for ``.tsv``
    and ``.tab`` and a comma for all others."""
    skip_bad_lines: bool = False
    """Whether to skip and count rows that cannot be used, instead of stopping at the first."""
    scheduler_address: str | None = None
    """Address of the scheduler of a Dask cluster whose workers see the same files; if absent, the work is done in this
    process."""
    append: bool = False
    """Whether the raw files hold further events of the data set that is already in the artifacts."""

    def __post_init__(self) -> None:
        if self.minimum < 3:
            raise InputError(
                f"minimum must be at least 3, not {self.minimum}: training, validation and test need one item each"
            )
        separator(self.delimiter)

    @property
    def layout(self) -> Layout:
        """Layout of a ``table``."""
        columns = self.user_column, self.item_column, self.timestamp_column, self.title_column
        return Layout(*columns, separator(self.delimiter), self.group_column)

    @property
    def name(self) -> str:
        """Name of the data set in tables: that of the raw file or folder, if given, as it is more specific."""
        return self.raw.resolve().stem if self.raw else self.dataset


@dataclass(frozen=True)
class AddedTitles:
    """Titles of the items that were added to a store while servers ran."""

    titles: Mapping[str, str]
    """Title of each item by its raw id."""
    dataset: str | None = None
    """Name of the data set that the store belongs to; None if nobody has said it yet."""


def preprocess(options: Preprocessing, artifacts: Path, added: AddedTitles | None = None) -> Statistics:
    """Write ``artifacts/data`` and return its statistics.

    The folder holds ``items.parquet``, ``sequences/`` and ``statistics.json``, and for a later append
    ``interactions.parquet``, ``added.parquet`` and ``workflow/``.

    Items without a title are dropped; the title of an added item counts where the raw files have none. Then items and
    users with fewer than ``minimum`` interactions are dropped, until all that remain have enough. Each user's
    interactions are ordered by (timestamp, raw item id); ids are compared as numbers if all of them are integers, and
    as bytes otherwise. A user's last item is for test and the second-to-last for validation. Items are numbered by
    descending number of interactions, then by raw id. The order of the raw rows does not matter.

    With ``append``, the result is the same as if all files had been there from the start, except for the item numbers:
    items already in the models' vocabulary keep their numbers, and new items follow.

    A folder that was made from the same options, raw files and added items, or to which these were already appended, is
    left as it is. Added items of an earlier run remain in an append.

    Args:
        options: see :class:`Preprocessing`.
        artifacts: folder of the data set's artifacts.
        added: titles of the items that were added since, if any.

    Raises:
        InputError: raw files are missing or unreadable, the added items are of another data set, or nothing is left
            after the filters.
    """
    if options.raw is None and options.dataset in EDITIONS:
        options = replace(options, raw=download_public(options.dataset, options.edition, artifacts / "raw"))
    files = raw_files(options.dataset, options.raw)
    recorded: dict[str, Any] = {
        "dataset": options.dataset,
        "name": options.name,
        "minimum": options.minimum,
        # What was not given is not recorded, as in artifacts of versions without the option.
        "columns": {name: value for name, value in vars(options.layout).items() if value is not None},
        "skip_bad_lines": options.skip_bad_lines,
    }
    inputs, titles = _fingerprints(files, options.raw), dict(added.titles) if added else {}
    given = {ADDED_INPUT: _fingerprint(titles)} if titles else {}
    folder = artifacts / "data"
    previous = load_previous(folder) if options.append else None
    if previous:
        recorded = dict(previous.manifest.options)
        titles = {**previous.added, **titles}
        files, inputs = _batch(files, inputs, previous.manifest.inputs)
    inputs |= given
    if added and added.dataset not in (None, recorded["name"]):
        raise InputError(
            f"the added items are of data set {added.dataset!r}, not of {recorded['name']!r}: name another store"
        )
    if is_finished(folder, KIND, options=recorded, inputs=inputs):
        return Statistics.read(folder)
    facts: dict[str, Any] = {}
    log = ReadingLog(options.skip_bad_lines)
    with (
        connected(options.scheduler_address) if options.scheduler_address else nullcontext(),
        _progress() as begin,
        _quiet_merlin(),
        new_artifact(folder, KIND, options=recorded, inputs=inputs, facts=facts) as partial,
        tempfile.TemporaryDirectory(dir=artifacts, prefix=".data.scratch-") as scratch,
    ):
        begin("reading")
        named = ", ".join(path.name for path in files[:3]) + (", ..." if len(files) > 3 else "")
        nothing = RawTables(iter(()), iter(()))
        tables = SOURCES[options.dataset].read(files, options.raw, options.layout, log) if files else nothing
        raw = ingest(tables, partial / INTERACTIONS_FILE, named, log, previous, titles)
        write_added(partial / ADDED_FILE, raw.added)
        for path, count in log.skipped().items():
            logging.getLogger(__name__).warning("%s: %d lines skipped", path, count)
        numbered = previous.numbered() if previous else []
        titled, *table_2 = _run_workflows(raw, recorded["minimum"], numbered, partial, Path(scratch), begin)
        statistics = Statistics(recorded["name"], *table_2)
        facts.update(statistics.row(), reading=_report(log, raw, files, options, titled, statistics))
        (partial / STATISTICS_FILE).write_text(json.dumps(statistics.row(), indent=1) + "\n", encoding="utf-8")
    return statistics


def read_report(artifacts: Path) -> dict[str, Any] | None:
    """Return what was read and left out when ``artifacts/data`` was made; None if version 0.1.0 made it.

    Raises:
        InputError: the folder is missing or was not written by `llamarec preprocess`.
    """
    report: dict[str, Any] | None = read_manifest(artifacts / "data", KIND, "llamarec preprocess").facts.get("reading")
    return report


def _fingerprints(files: list[Path], raw: Path | None) -> dict[str, str]:
    """Return a hash of each raw file by its name, within the raw folder if there is one."""
    folder = raw if raw and raw.is_dir() else None
    return {path.relative_to(folder).as_posix() if folder else path.name: file_fingerprint(path) for path in files}


def _batch(files: list[Path], inputs: dict[str, str], before: Mapping[str, str]) -> tuple[list[Path], dict[str, str]]:
    """Return the files that have not been appended yet, and the inputs of the longer data set."""
    if set(inputs.values()) <= set(before.values()):
        return [], dict(before)
    batch = f"batch {len(before.keys() - {ADDED_INPUT})}: "
    return files, {**before, **{batch + name: value for name, value in inputs.items()}}


def _fingerprint(titles: Mapping[str, str]) -> str:
    """Return a hash of titles, whatever their order."""
    return hashlib.sha256(json.dumps(titles, sort_keys=True).encode()).hexdigest()


def _report(
    log: ReadingLog, raw: Raw, files: list[Path], options: Preprocessing, titled: int, statistics: Statistics
) -> dict[str, Any]:
    """Return what was read and what was dropped, for the manifest.

    Args:
        log: record of the files that were read.
        raw: the data set as read.
        files: the raw files.
        options: options of the stage.
        titled: number of interactions of items with a title.
        statistics: the result.
    """
    folder = options.raw if options.raw and options.raw.is_dir() else None
    visible = visible_files(folder) if folder else []
    return {
        "files": log.report(folder),
        "unread": relative_names(set(visible) - set(files), folder),
        "interactions": raw.rows,
        "times": raw.times,
        "titles": {
            "items": len(raw.titles),
            **({"added": len(raw.added)} if raw.added else {}),
            **({"grouped": len(raw.groups.keys() & raw.titles.keys())} if raw.groups else {}),
            "several": raw.several_titles,
            "dropped": dict(log.titles),
        },
        "dropped": {
            "of items without a title": raw.rows - titled,
            "outside the k-core": titled - statistics.interactions,
        },
    }


def raw_order(ids: Iterable[Any]) -> Callable[[Any], Any]:
    """Return a sort key for raw ids: they sort as numbers if all of them are integers, and by their bytes otherwise."""
    if all(isinstance(raw, int) for raw in ids):
        return lambda raw: raw
    if all(raw.isascii() and raw.removeprefix("-").isdigit() for raw in ids):
        return lambda raw: (int(raw), raw)
    return lambda raw: raw.encode()


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Show a progress bar over the steps; yield a function to call with a step's name when the step begins."""
    with progress_bar(transient=True) as bar:
        task = bar.add_task("", total=STEPS, completed=-1, note="")
        yield lambda step: bar.update(task, description=step, advance=1)


@contextmanager
def _quiet_merlin() -> Iterator[None]:
    """Suppress what users cannot act on.

    Merlin warns about the missing GPU (at each step) and the missing TensorFlow (at import), and newer versions of Dask
    about the data frames that Merlin needs (see :mod:`preprocessing`).
    """
    with warnings.catch_warnings():
        for message in (
            "Initializing an NVTabular Dataset in CPU mode",
            "Tensorflow dtype",
            "The legacy Dask DataFrame",
        ):
            warnings.filterwarnings("ignore", message=message)
        yield


def _run_workflows(
    raw: Raw, minimum: int, numbered: list[str], folder: Path, scratch: Path, begin: Callable[[str], None]
) -> tuple[int, int, int, int]:
    """Fill ``folder``; ``numbered`` items come first.

    Returns:
        Number of interactions of items with a title, and of the users, items and interactions that are left.
    """
    begin("title filter")
    # Imported here because NVTabular and Dask take seconds to import, which a finished stage need not spend.
    from preprocessing import workflows

    titled_workflow, titled = workflows.keep_titled(workflows.open_interactions(raw.interactions, raw.rows), raw.titles)
    begin(f"{minimum}-core")
    core_workflow, core, kept = workflows.keep_core(titled, minimum)
    if not core.seen:
        raise InputError(
            "no item of the interactions has a title; check that interactions and titles use the same item ids"
        )
    if not core.items:
        raise InputError(
            f"{minimum}-core filtering leaves nothing of {raw.rows:,} interactions: every user and every titled"
            f" item needs at least {minimum} among those that remain; give more data"
        )
    item_key = raw_order(raw.titles)
    # No numbered item is missing: further interactions can only make a k-core larger.
    known = {item: place for place, item in enumerate(numbered)}
    items = sorted(core.items, key=lambda item: (known.get(str(item), len(known)), -core.items[item], item_key(item)))
    users = {user: core.users[user] for user in sorted(core.users, key=raw_order(core.users))}
    interactions = sum(core.items.values())
    begin("item numbers")
    encode_workflow, encoded = workflows.encode(kept, users, items, scratch)
    begin("sequences")
    places = np.empty(len(items), np.int64)
    places[sorted(range(len(items)), key=lambda number: item_key(items[number]))] = np.arange(len(items))
    sequence_workflow, sequences = workflows.sequences(encoded, [str(user) for user in users], places)
    sequences.to_parquet(str(folder / SEQUENCES_FOLDER))
    for name, workflow in (
        ("titled", titled_workflow),
        ("core", core_workflow),
        ("encode", encode_workflow),
        ("sequences", sequence_workflow),
    ):
        workflow.save(str(folder / WORKFLOW_FOLDER / name))
    _catalogue(items, raw, _training_counts(folder, len(items))).write(folder / ITEMS_FILE)
    return core.seen, len(users), len(items), interactions


def _training_counts(folder: Path, items: int) -> NDArray[np.int64]:
    """Return how often each k-core item occurs in the training parts, which is the popularity that models may use."""
    counts = np.zeros(items + 1, np.int64)
    for table in read_sequences(folder, ["training"]):
        counts += np.bincount(table["training"].combine_chunks().flatten().to_numpy(), minlength=items + 1)
    return counts[1:]


def _catalogue(items: list[Any], raw: Raw, counts: NDArray[np.int64]) -> Catalogue:
    """Return the catalogue of the k-core's items, followed by every other item with a title in the order of raw ids."""
    titles = raw.titles
    others = sorted(titles.keys() - set(items), key=raw_order(titles))
    ids = [*items, *others]
    groups = [raw.groups.get(item) for item in ids] if raw.groups else ()
    return Catalogue([str(item).encode() for item in ids], [titles[item] for item in ids], counts.tolist(), groups)
