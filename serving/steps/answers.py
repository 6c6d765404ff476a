"""The log of answers: what was shown to whom, as Parquet, for :mod:`serving.feedback`.

The last step of each ensemble puts its answers into a bounded queue, and a thread writes them. An answer never waits
for the log: if the queue is full, the answer is not logged, and that is counted.
"""

import hashlib
import json
import os
import queue
import random
import secrets
import sys
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from llamarec_client.contract import ENSEMBLE, ITEM_ID, MAX_ID_BYTES, RETRIEVAL_ENSEMBLE, RETRIEVER_RANK, SCORE
from preprocessing.artifacts import replacing
from preprocessing.errors import InputError
from serving.contract import ANSWERS_VARIABLE, HANDED_ON_BY_RETRIEVER, PROBE, SAMPLE_VARIABLE, USER
from serving.histories import check_user
from serving.layout import exported_dataset
from serving.steps.step import Answer, Tensors

SCHEMA = pa.schema(
    {
        "request": pa.string(),
        "time": pa.timestamp("ms", tz="UTC"),
        "user": pa.string(),
        "release": pa.string(),
        "ensemble": pa.string(),
        "items": pa.list_(pa.string()),
        "scores": pa.list_(pa.float32()),
        "retriever_ranks": pa.list_(pa.int32()),
        "degraded": pa.string(),
    }
)
"""Columns of a file, one row for each answer. ``user`` is null if the request named none, and ``degraded`` is null
unless the client asked for a fallback."""
DATASET_KEY = b"llamarec.answers.dataset"
"""Key of a file's metadata with the name of the data set, which also tells the log's files from others."""
QUEUE_ANSWERS = 10_000
"""Number of answers that may wait for the thread: at 2,000 requests a second, for a disk that hangs for 5 s."""
FILE_SECONDS, FILE_BYTES = 300.0, 32 << 20
"""Age and size in memory at which the answers that wait for their file are written."""
DRAIN_SECONDS = 0.25
"""Time in seconds between two looks into the queue. To wait for each single answer would take the thread more work."""
CHUNK = 100
"""Number of answers that are converted at once: conversion holds Python's lock, here for less than a millisecond."""
CLOSE_SECONDS = 5.0
"""Maximum time in seconds for the last file, within the time that a server has to exit."""


class Shown(NamedTuple):
    """One answer as it waits for its file."""

    request: str
    time: int
    """Milliseconds since 1970, UTC."""
    user: bytes | None
    ensemble: str
    items: NDArray[np.object_]
    scores: NDArray[np.float32]
    retriever_ranks: NDArray[np.int32]
    degraded: str | None


def open_log(step: str, artifact: Path, release: str, count: Callable[[int, str | None], None]) -> "AnswerLog | None":
    """Return the log that the environment names, for a step that ends an ensemble.

    Args:
        step: name of the step.
        artifact: the step's exported files.
        release: name or export id of the release.
        count: see :class:`AnswerLog`.

    Raises:
        InputError: the share of the answers to log is not from 0 to 1.
    """
    folder = os.environ.get(ANSWERS_VARIABLE)
    if not folder or step not in ("retriever", "ranker"):
        return None
    sample = os.environ.get(SAMPLE_VARIABLE) or "1"
    share = -1.0
    with suppress(ValueError):
        share = float(sample)
    if not 0 <= share <= 1:
        raise InputError(f"{SAMPLE_VARIABLE} is {sample!r}: give a share of the answers from 0 to 1, such as 0.1")
    return AnswerLog(Path(folder), step, release, exported_dataset(artifact), count, share=share)


def answered_ensemble(step: str, wanted: Collection[str]) -> str | None:
    """Return the ensemble whose answer a step gives; None if the step does not give the answer of an ensemble.

    An ensemble asks a step only for the outputs that it uses. So the retriever can tell the ensemble that returns its
    answer from the one that hands its candidates to the ranker, and from a caller of the step itself, who by default
    gets both.

    Args:
        step: name of the step.
        wanted: names of the outputs that are asked for.
    """
    if step == "ranker":
        return ENSEMBLE
    return RETRIEVAL_ENSEMBLE if HANDED_ON_BY_RETRIEVER.isdisjoint(wanted) else None


def is_sampled(request_id: str, share: float) -> bool:
    """Return whether the answers to a request are logged: its id decides, for all ensembles and servers alike.

    Requests without an id are drawn at random, as one id of all of them would decide for all.
    """
    if share >= 1:
        return True
    if not request_id:
        return random.random() < share
    digest = hashlib.sha256(request_id.encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


class AnswerLog:
    """Writes the answers of one step's process, into files in a folder that any number of processes can share.

    A file is written aside and renamed, so it is whole or absent. Answers wait in memory until their file is old or
    large enough, or the process ends; those of a process that is killed are lost.

    Args:
        folder: for the files; it is made if it is absent.
        step: name of the step.
        release: name or export id of the release.
        dataset: name of the data set.
        count: called with the number of answers that were written, or with that of lost ones and the reason.
        share: share of the requests whose answers are logged.
        file_seconds: see :data:`FILE_SECONDS`.
        file_bytes: see :data:`FILE_BYTES`.
        waiting: see :data:`QUEUE_ANSWERS`.
    """

    def __init__(
        self,
        folder: Path,
        step: str,
        release: str,
        dataset: str,
        count: Callable[[int, str | None], None],
        *,
        share: float = 1.0,
        file_seconds: float = FILE_SECONDS,
        file_bytes: int = FILE_BYTES,
        waiting: int = QUEUE_ANSWERS,
    ) -> None:
        self._folder, self._step, self._release, self._count, self._share = folder, step, release, count, share
        self._file_seconds, self._file_bytes = file_seconds, file_bytes
        self._schema = SCHEMA.with_metadata({DATASET_KEY: dataset.encode()})
        pa.array([None])  # the first conversion imports pandas where that is installed: not while answers wait for it
        self._waiting: queue.Queue[Shown] = queue.Queue(waiting)
        self._batches: list[pa.RecordBatch] = []
        self._oldest = 0.0
        """Time at which the first of the batches was taken from the queue, by the monotonic clock."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write_regularly, name="answers", daemon=True)
        self._thread.start()

    def add(
        self, request_id: str, wanted: Collection[str], request: Tensors, answer: Answer, degraded: str | None
    ) -> None:
        """Log an answer unless it is none of an ensemble, is that of a probe, is not sampled, or the queue is full.

        Args:
            request_id: id of the request.
            wanted: names of the outputs that are asked for.
            request: the step's inputs.
            answer: its outputs.
            degraded: why the client asked for a fallback, if it did.
        """
        ensemble = answered_ensemble(self._step, wanted)
        if ensemble is None or request_id == PROBE or not is_sampled(request_id, self._share):
            return
        shown = Shown(
            request_id[:MAX_ID_BYTES],
            time.time_ns() // 1_000_000,
            _user(request),
            ensemble,
            # Copied: an array may lie in memory that Triton uses again after the answer.
            np.array(answer[ITEM_ID], dtype=object),
            np.array(answer[SCORE], dtype=np.float32),
            np.array(answer[RETRIEVER_RANK], dtype=np.int32),
            degraded,
        )
        try:
            self._waiting.put_nowait(shown)
        except queue.Full:
            self._count(1, "full")

    def close(self) -> None:
        """Write what waits, and end the thread."""
        self._ended.set()
        self._thread.join(CLOSE_SECONDS)

    def _write_regularly(self) -> None:
        while not self._ended.wait(DRAIN_SECONDS):
            self._drain()
            if self._batches and time.monotonic() - self._oldest >= self._file_seconds:
                self._write()
        self._drain()
        if self._batches:
            self._write()

    def _drain(self) -> None:
        """Convert what is in the queue, and write it wherever it fills a file."""
        while not self._waiting.empty():
            rows: list[Shown] = []
            with suppress(queue.Empty):
                while len(rows) < CHUNK:
                    rows.append(self._waiting.get_nowait())
            try:
                batch = self._batch(rows)
            except (pa.ArrowException, ValueError) as error:  # not text, which the steps do not give
                self._lose(len(rows), "invalid", error)
                continue
            if not self._batches:
                self._oldest = time.monotonic()
            self._batches.append(batch)
            if sum(batch.nbytes for batch in self._batches) >= self._file_bytes:
                self._write()

    def _batch(self, rows: list[Shown]) -> pa.RecordBatch:
        columns: dict[str, Any] = dict(zip(Shown._fields, zip(*rows, strict=True), strict=True))
        columns["release"] = [self._release] * len(rows)
        return pa.record_batch([pa.array(columns[field.name], field.type) for field in self._schema], self._schema)

    def _write(self) -> None:
        """Write the file of all batches. Where that fails, they are lost: the step has to go on."""
        table = pa.Table.from_batches(self._batches, self._schema)
        self._batches = []
        moment = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S")
        try:
            with replacing(self._folder / f"{moment}-{secrets.token_hex(6)}.parquet") as partial:
                pq.write_table(table, partial, compression="zstd")
                with partial.open("rb") as file:
                    os.fsync(file.fileno())  # else a machine that crashes may keep the new name without the content
        except OSError as error:
            self._lose(len(table), "disk", error)
        else:
            self._count(len(table), None)

    def _lose(self, answers: int, reason: str, error: Exception) -> None:
        """Count answers that cannot be written, and say why in the server's log."""
        self._count(answers, reason)
        line = {"time": round(time.time(), 3), "step": self._step, "event": "answers lost", "message": str(error)}
        sys.stderr.write(json.dumps(line) + "\n")
        sys.stderr.flush()


def _user(request: Tensors) -> bytes | None:
    """Return the user of a request, if there is one whose events a store could have."""
    if USER not in request or not len(request[USER]):
        return None
    user: bytes = request[USER][0]
    try:
        check_user(user)
    except InputError:
        return None
    return user
