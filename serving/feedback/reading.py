"""Reads the log of answers, and the events of the users in it."""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from llamarec_client.contract import ENSEMBLE
from preprocessing.errors import InputError
from preprocessing.report import ReadingLog
from preprocessing.sources import Layout
from preprocessing.times import ORDINAL
from serving.steps.answers import DATASET_KEY, SCHEMA
from stores.address import open_store
from stores.loading import milliseconds, read_events


@dataclass(frozen=True)
class Answers:
    """Answers to users with an id."""

    dataset: str
    rows: pa.Table
    """With the log's columns, and ``group``: the release, and which ensemble was asked if not `llamarec`."""
    anonymous: int
    """Number of answers that name no user, which are left out."""
    replaced: int
    """Number of answers that came too late for their client, which showed the fallback instead; left out."""


@dataclass(frozen=True)
class Events:
    """What some users did."""

    users: pa.Array
    """User ids [n]."""
    items: pa.Array
    """Item ids [n]."""
    times: NDArray[np.int64]
    """Milliseconds since 1970, UTC [n]."""
    skipped: int
    """Number of rows of a file that were left out because they are not usable."""


def read_answers(folder: Path) -> Answers:
    """Return the answers of a log to users with an id.

    Raises:
        InputError: there is none, or a file in the folder is not one of a log, or of another data set.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: name the one that `llamarec serve --answers` was given")
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))  # .*: being written
    if not paths:
        raise InputError(
            f"{folder} has no answers: start the server with `llamarec serve --answers {folder}`; a file appears every"
            " few minutes in which answers are given, and when the server stops"
        )
    found = [_read_file(path) for path in paths]
    for path, (dataset, _) in zip(paths, found, strict=True):
        if dataset != found[0][0]:
            raise InputError(
                f"{path} has answers of data set {dataset!r}, and {paths[0].name} those of {found[0][0]!r}: give each"
                " data set a folder of its own"
            )
    rows = pa.concat_tables([table for _, table in found])
    named = rows.filter(rows["user"].is_valid())
    if not len(named):
        raise InputError(
            f"none of the {len(rows):,} answers in {folder} names a user: send USER_ID with the requests, and export"
            " the repository again if an earlier version exported it, which keeps USER_ID from the log"
        )
    kept = _without_replaced(named)
    return Answers(found[0][0], _grouped(kept), len(rows) - len(named), len(named) - len(kept))


def _read_file(path: Path) -> tuple[str, pa.Table]:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path} is no whole Parquet file: move it out of the folder; the server renames files when they are whole,"
            " so this one was cut off later or comes from elsewhere"
        ) from error
    dataset = (table.schema.metadata or {}).get(DATASET_KEY)
    if dataset is None or table.schema.remove_metadata() != SCHEMA:
        raise InputError(f"{path} is no file of a log of answers: move it out of the folder")
    return dataset.decode(), table


def _without_replaced(rows: pa.Table) -> pa.Table:
    """Return the answers without those whose request was also answered by a fallback.

    A client that falls back shows the fallback. The ranker may answer the same request after that, for nobody.
    """
    marked = rows["degraded"].is_valid()
    ids = pc.binary_join_element_wise(rows["user"], rows["request"], "\0")
    replaced = pc.and_(pc.and_(pc.is_in(ids, ids.filter(marked).combine_chunks()), pc.invert(marked)), _has_id(rows))
    return rows.filter(pc.invert(replaced))


def _has_id(rows: pa.Table) -> pa.ChunkedArray:
    return pc.not_equal(rows["request"], "")


def _grouped(rows: pa.Table) -> pa.Table:
    """Return the rows with ``group``. A fallback counts for the ensemble that it stands in for."""
    asked = pc.or_(pc.equal(rows["ensemble"], ENSEMBLE), rows["degraded"].is_valid())
    retrieval = pc.binary_join_element_wise(rows["release"], "(retrieval)", " ")
    return rows.append_column("group", pc.if_else(asked, rows["release"], retrieval))


def read_user_events(source: str, answers: Answers, layout: Layout | None = None) -> Events:
    """Return the events of the answers' users.

    Args:
        source: address of a store; or a file or folder, or the artifacts of `llamarec preprocess`.
        answers: whose users are looked for.
        layout: columns of the files. Default: ``user``, ``item`` and ``timestamp``.

    Raises:
        InputError: the events are those of another data set or of nobody in the answers, or have no times of the clock.
        StoreError: the store cannot be reached.
    """
    users = pc.unique(answers.rows["user"])
    if "://" in source:
        events = _store_events(source, users, answers.dataset)
    else:
        events = _file_events(Path(source), users, answers.dataset, layout)
    if not len(events.times):
        raise InputError(
            f"none of the {len(users):,} users of the answers has an event in {_shown(source)}: give the events of the"
            " same service, whose user ids are those of USER_ID"
        )
    return events


def _store_events(url: str, users: pa.Array, dataset: str) -> Events:
    with closing(open_store(url)) as store:
        known = store.dataset()
        if known is not None:
            _check_dataset(url, known, dataset)
        rows = [(user, event.item, event.time) for user in users.to_pylist() for event in store.last(user.encode())]
    names, items, times = zip(*rows, strict=True) if rows else ((), (), ())
    return Events(pa.array(names, pa.string()), pa.array(items, pa.string()), np.array(times, np.int64), 0)


def _file_events(source: Path, users: pa.Array, dataset: str, layout: Layout | None) -> Events:
    log = ReadingLog(skip=True)
    known, parts = read_events(source, layout, log)
    if known is not None:
        _check_dataset(str(source), known, dataset)
    kept_users, kept_items, times = [], [], []
    for part in parts:
        if part.kind == ORDINAL:
            raise InputError(
                f"the times of {source} are numbers that only order its events: give times of the clock, such as"
                " milliseconds since 1970, which can be compared with those of the answers"
            )
        ids = part.rows["user"].cast(pa.string())
        wanted = pc.is_in(ids, users)
        kept_users.append(ids.filter(wanted))
        kept_items.append(part.rows["item"].cast(pa.string()).filter(wanted))
        times.append(milliseconds(part).filter(wanted).to_numpy(zero_copy_only=False))
    return Events(
        pa.chunked_array(kept_users, pa.string()).combine_chunks(),
        pa.chunked_array(kept_items, pa.string()).combine_chunks(),
        np.concatenate([np.array([], np.int64), *times]),
        sum(log.skipped().values()),
    )


def _check_dataset(source: str, found: str, expected: str) -> None:
    if found != expected:
        raise InputError(
            f"{_shown(source)} has the events of data set {found!r}, and the answers are of {expected!r}: name"
            " the events of the same data set"
        )


def _shown(source: str) -> str:
    """Return an address or a path without what may be a password."""
    return source.rpartition("@")[2]
