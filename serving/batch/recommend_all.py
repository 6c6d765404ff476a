"""Recommends for every user of a data artifact or of a store, as Parquet, equal to what the server answers."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from preprocessing.artifacts import Manifest
from preprocessing.cluster import connected
from preprocessing.errors import InputError
from preprocessing.progress import progress_bar
from serving.batch.folder import Folder, Identity, Plan, hash_histories, hash_items
from serving.batch.partitions import STAGES, Work, load_answer, work_on, write_partition
from serving.batch.users import Users
from serving.layout import check_adapters, exported_dataset, exported_release, step_artifact
from stores.store import Listing

PARTITION_SIZES = {"ranking": 100, "retrieval": 10_000}
"""Default numbers of users in a partition: an interruption loses minutes of a ranker, or seconds of a retriever."""
NO_ITEMS = Listing(0, (), frozenset())


@dataclass(frozen=True, kw_only=True)
class RecommendAll:
    """What is recommended to each user, and how the work is divided."""

    stage: str = "ranking"
    """``ranking``: the answers of the ensemble ``llamarec``; ``retrieval``: those of ``llamarec_retrieval``."""
    top_k: int | None = 20
    """Number of items for each user; None for all candidates."""
    partition_size: int | None = None
    """Number of users in a Parquet file. Default: see :data:`PARTITION_SIZES`."""
    scheduler_address: str | None = None
    """Address of the scheduler of a Dask cluster whose workers see the same files; if absent, this process works."""

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise InputError(f"there is no stage {self.stage!r}: choose {' or '.join(STAGES)}")
        if self.partition_size is not None and self.partition_size < 1:
            raise InputError(f"partition_size is {self.partition_size}: give a number of users, at least 1")


def recommend_all(
    options: RecommendAll,
    repository: Path,
    users: Users,
    output: Path,
    *,
    listing: Listing = NO_ITEMS,
    suffix: str = "",
) -> Manifest:
    """Write the recommendations of all users into a folder, and return its manifest.

    Each user's answer is that of the server to a request with this history, bit for bit. Partitions that the folder has
    already are kept: a call that was interrupted is repeated, and goes on with the histories that the first one read.

    Args:
        options: see :class:`RecommendAll`.
        repository: what `llamarec export` or `llamarec release build` wrote.
        users: the users and their histories.
        output: a new folder, or that of an interrupted call.
        listing: items that are added and hidden.
        suffix: that of a release's models.

    Raises:
        InputError: the export is incomplete, of an earlier version or of other data; the folder has the recommendations
            of another export, of other users or options; there are no users; or no scheduler answers.
        StoreError: the store of the users cannot be reached.
        OSError: the disk is full; the partitions that are there are whole.
    """
    check_adapters(repository, [suffix])
    identity = _identity(options, repository, suffix, users, listing)
    folder = Folder(output.resolve())
    with folder.locked():
        if folder.is_finished():
            return _unchanged(folder, identity, users)
        plan = folder.begun(identity) or folder.begin(identity, users, listing)
        work = Work(folder.path, repository.resolve(), suffix, identity.export, options.stage, options.top_k)
        missing = [number for number in range(plan.partitions) if not folder.partition(number).is_file()]
        work_on_all = _worker(options, folder, plan, work, missing)  # loads the models, which is no part of the rate
        started = time.monotonic()
        done = 0
        with progress_bar(transient=True) as bar:
            task = bar.add_task("recommending", total=len(missing), note="")
            for count in work_on_all:
                done += count
                bar.advance(task)
        return folder.finish(plan, _facts(plan, repository, suffix, done, time.monotonic() - started))


def _identity(options: RecommendAll, repository: Path, suffix: str, users: Users, listing: Listing) -> Identity:
    """Return what the batch is known by.

    Raises:
        InputError: the repository has no complete export, or one of another data set than the users'.
    """
    export = exported_release(repository, suffix)
    dataset = exported_dataset(step_artifact(repository, "features", suffix))
    if users.dataset not in (None, dataset):
        raise InputError(
            f"{repository} was exported from data set {dataset!r}, and the users are of {users.dataset!r}: name the"
            " repository of the same data set"
        )
    return Identity(
        export=export,
        stage=options.stage,
        top_k=options.top_k,
        partition_size=options.partition_size or PARTITION_SIZES[options.stage],
        users=users.source,
        items=hash_items(listing),
    )


def _unchanged(folder: Folder, identity: Identity, users: Users) -> Manifest:
    """Return the manifest of a finished batch, if the histories are still those that it was made from.

    Raises:
        InputError: it is another batch, or the histories have changed.
    """
    manifest = folder.finished(identity)
    if hash_histories(users) != manifest.inputs["histories"]:
        raise InputError(
            f"{folder.path} holds the recommendations of {manifest.facts['histories_of']}, and the histories have"
            " changed since: name another folder, or delete it"
        )
    return manifest


def _worker(options: RecommendAll, folder: Folder, plan: Plan, work: Work, missing: Sequence[int]) -> Iterator[int]:
    """Return what works on the missing partitions, and yields the number of users of each as it is written."""
    if options.scheduler_address is not None:
        return _on_cluster(options.scheduler_address, work, missing)
    if not missing:
        return iter(())
    answer = load_answer(work, plan.listing())
    return (write_partition(folder, number, answer) for number in missing)


def _on_cluster(address: str, work: Work, missing: Iterable[int]) -> Iterator[int]:
    """Have a Dask cluster work on partitions; those of a worker that dies are given to another.

    Raises:
        InputError: no scheduler answers, or a partition's workers died again and again.
    """
    with connected(address) as client:
        from distributed import KilledWorker, as_completed

        try:
            for future in as_completed(client.map(partial(work_on, work), missing, pure=False)):
                yield future.result()
        except KilledWorker as error:
            raise InputError(
                f"the workers of the cluster died at work ({error}): give each the memory of a ranker, and repeat the"
                " command, which goes on"
            ) from None


def _facts(plan: Plan, repository: Path, suffix: str, done: int, seconds: float) -> dict[str, Any]:
    """Return the figures of the manifest. The rate is that of the call that ends the batch."""
    return {
        "dataset": exported_dataset(step_artifact(repository, "features", suffix)),
        "users": plan.users,
        "partitions": plan.partitions,
        "histories_of": plan.taken,
        "users_of_last_call": done,
        "seconds_of_last_call": round(seconds, 3),
        "users_per_second": round(done / seconds, 3) if done else None,
    }
