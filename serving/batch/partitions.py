"""The work on one partition: the answers to its users, from the exported files, in this process or in a Dask worker."""

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from preprocessing.artifacts import replacing
from preprocessing.errors import InputError
from serving.batch.folder import Folder
from serving.layout import exported_release
from serving.offline import ExportedSteps, RetrievalSteps, Row
from stores.store import Listing

STAGES = ("ranking", "retrieval")
"""Ensembles whose answers are given: ``llamarec`` and ``llamarec_retrieval``."""
SCHEMA = pa.schema(
    {
        "user": pa.string(),
        "items": pa.list_(pa.string()),
        "scores": pa.list_(pa.float32()),
        "retriever_ranks": pa.list_(pa.int32()),
    }
)
"""Columns of a partition, one row for each user; the lists are best first."""
Answer = Callable[[Sequence[str]], list[Row]]
"""Returns the answer to a history of raw ids."""
_LOCK = threading.Lock()
"""Held at work: the threads of a Dask worker share its models, which answer one request at a time."""


@dataclass(frozen=True)
class Work:
    """What a process has to know to work on a partition."""

    output: Path
    repository: Path
    suffix: str
    """Suffix of the release's models in the repository."""
    export: str
    """Id of the export that must be there."""
    stage: str
    top_k: int | None


def load_answer(work: Work, listing: Listing) -> Answer:
    """Open the exported files of a stage, with the items that were added and hidden, and return what answers.

    Raises:
        InputError: the repository has another export, or ``top_k`` is more than it answers.
    """
    if exported_release(work.repository, work.suffix) != work.export:
        raise InputError(f"{work.repository} is another export than that of {work.output}: name another output folder")
    retrieval = RetrievalSteps.load(work.repository, work.suffix).with_items(listing)
    retrieval.features.encode([], top_k=work.top_k)  # refuses a number that is too large before the ranker is loaded
    if work.stage == "retrieval":
        return lambda history: retrieval.recommend(history, work.top_k)
    steps = ExportedSteps.load(work.repository, work.suffix).with_items(listing)
    return lambda history: steps.recommend(history, top_k=work.top_k)


def write_partition(folder: Folder, number: int, answer: Answer) -> int:
    """Write the answers to the users of a partition, and return how many users there are."""
    rows = folder.histories(number)
    answers = [answer(row.history) for row in rows]
    columns = {
        "user": [row.user for row in rows],
        **{name: [[row[place] for row in rows] for rows in answers] for place, name in enumerate(SCHEMA.names[1:])},
    }
    with replacing(folder.partition(number)) as partial:
        pq.write_table(pa.table(columns, SCHEMA), partial, compression="zstd")
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # else a machine that crashes may keep the new name without the content
    return len(rows)


def work_on(work: Work, number: int) -> int:
    """Work on a partition in a Dask worker, which keeps the models for the next; return the number of users.

    A partition that is there already was written by a worker that died before it could say so.
    """
    folder = Folder(work.output)
    if folder.partition(number).is_file():
        return 0
    with _LOCK:
        return write_partition(folder, number, _kept_answer(work))


@lru_cache(maxsize=1)
def _kept_answer(work: Work) -> Answer:
    return load_answer(work, Folder(work.output).plan().listing())
