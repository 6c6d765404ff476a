"""The output folder of a batch: what is to be done, what is done already, and the manifest that ends it.

::

    DIR/recommendations/part-00000.parquet    answers, users in order; each file is whole or absent
    DIR/manifest.json                         written last
    DIR/.work/                                plan and histories of an unfinished batch

A batch works on the histories as they were when it began, so that it can go on after an interruption, and so that the
workers of a cluster need no store.
"""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from preprocessing.artifacts import MANIFEST, Manifest, plain, read_manifest, replacing, write_manifest, write_whole
from preprocessing.errors import InputError
from serving.batch.users import UserHistory
from stores.store import AddedItem, Listing

KIND = "recommendations"
COMMAND = "llamarec recommend-all"
RECOMMENDATIONS, WORK = "recommendations", ".work"
HISTORIES = pa.schema({"user": pa.string(), "history": pa.list_(pa.string())})


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What two batches have in common if one can go on with the output of the other."""

    export: str
    """Id of the export."""
    stage: str
    top_k: int | None
    partition_size: int
    users: str
    """Where the users come from."""
    items: str
    """Hash of the added and hidden items."""


@dataclass(frozen=True)
class Plan:
    """A batch that has begun."""

    identity: Identity
    users: int
    partitions: int
    histories: str
    """Hash of all users and their histories."""
    taken: str
    """Time in ISO 8601 at which the histories were read."""
    added: list[tuple[str, str]] = field(default_factory=list)
    """Raw id and title of each added item."""
    hidden: list[str] = field(default_factory=list)

    def listing(self) -> Listing:
        """Return the added and hidden items."""
        added = tuple(AddedItem(item.encode(), title) for item, title in self.added)
        return Listing(0, added, frozenset(item.encode() for item in self.hidden))


def hash_items(listing: Listing) -> str:
    """Return a hash of the added and hidden items."""
    added, hidden = [[item.decode(), title] for item, title in listing.added], sorted(map(bytes.decode, listing.hidden))
    return hashlib.sha256(json.dumps([added, hidden]).encode()).hexdigest()


@dataclass(frozen=True)
class Folder:
    """The output folder of a batch."""

    path: Path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other batches out of the folder, which is made if it is absent.

        Raises:
            InputError: another process writes to it, or it holds something else.
        """
        if self.path.exists() and (not self.path.is_dir() or self._holds_something_else()):
            raise InputError(f"{self.path} holds something else than recommendations: name a new folder")
        self._work.mkdir(parents=True, exist_ok=True)
        with (self._work / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(f"another `{COMMAND}` writes to {self.path}: wait for it, or name another") from None
            try:
                yield
            finally:
                if self.is_finished() or not self._plan.is_file():
                    shutil.rmtree(self._work, ignore_errors=True)  # gone if a call that just ended removed it

    def is_finished(self) -> bool:
        """Return whether a batch has ended here."""
        return (self.path / MANIFEST).is_file()

    def finished(self, identity: Identity) -> Manifest:
        """Return the manifest of the batch that has ended here.

        Raises:
            InputError: it is another batch than ``identity`` says, or its files were changed.
        """
        manifest = read_manifest(self.path, KIND, f"{COMMAND} --output")
        self._check({**manifest.options, **manifest.inputs}, identity)
        return manifest

    def begun(self, identity: Identity) -> Plan | None:
        """Return the plan of the batch that was interrupted here; None if there is none.

        Raises:
            InputError: it is another batch than ``identity`` says.
        """
        if not self._plan.is_file():
            return None
        plan = self.plan()
        self._check(asdict(plan.identity), identity)
        return plan

    def begin(self, identity: Identity, users: Iterable[UserHistory], listing: Listing) -> Plan:
        """Write the histories and the plan of a new batch.

        Raises:
            InputError: there are no users.
        """
        taken = datetime.now(timezone.utc).isoformat(timespec="seconds")
        shutil.rmtree(self._work / "histories", ignore_errors=True)  # left by a run that was killed before its plan
        digest, count, partitions, rows = hashlib.sha256(), 0, 0, iter(users)
        while part := list(islice(rows, identity.partition_size)):
            for row in part:
                _update(digest, row)
            columns = dict(zip(HISTORIES.names, zip(*part, strict=True), strict=True))
            with replacing(self._histories(partitions)) as partial:
                pq.write_table(pa.table(columns, HISTORIES), partial, compression="zstd")
            count, partitions = count + len(part), partitions + 1
        if not count:
            raise InputError(f"there are no users to recommend for in the {identity.users}: record events first")
        added = [(item.decode(), title) for item, title in listing.added]
        hidden = sorted(item.decode() for item in listing.hidden)
        plan = Plan(identity, count, partitions, digest.hexdigest(), taken, added, hidden)
        write_whole(self._plan, json.dumps(asdict(plan)) + "\n")
        return plan

    def plan(self) -> Plan:
        """Return the plan of the batch that is at work."""
        stored = json.loads(self._plan.read_text(encoding="utf-8"))
        return Plan(**{**stored, "identity": Identity(**stored["identity"])})

    def histories(self, number: int) -> list[UserHistory]:
        """Return the users of a partition and their histories."""
        table = pq.read_table(self._histories(number))
        return list(map(UserHistory, *(table[name].to_pylist() for name in HISTORIES.names)))

    def partition(self, number: int) -> Path:
        """Return the path of a partition's answers."""
        return self.path / RECOMMENDATIONS / f"part-{number:05}.parquet"

    def finish(self, plan: Plan, facts: Mapping[str, Any]) -> Manifest:
        """Write the manifest of a batch whose partitions are all there."""
        for stale in self.partition(0).parent.glob(".*.partial"):
            stale.unlink()  # of a worker that was killed
        identity = asdict(plan.identity)
        write_manifest(
            self.path,
            KIND,
            map(self.partition, range(plan.partitions)),
            options={name: identity[name] for name in ("stage", "top_k", "partition_size")},
            inputs={**{name: identity[name] for name in ("export", "users", "items")}, "histories": plan.histories},
            facts=facts,
        )
        return self.finished(plan.identity)

    def _holds_something_else(self) -> bool:
        names = {file.name for file in self.path.iterdir() if not file.name.startswith(".")}  # what was written aside
        return bool(names - {RECOMMENDATIONS, MANIFEST})

    def _check(self, found: Mapping[str, Any], identity: Identity) -> None:
        wanted = plain(asdict(identity))
        if others := [name for name, value in wanted.items() if found.get(name) != value]:
            raise InputError(
                f"{self.path} holds the recommendations of another {' and '.join(others)}: name another folder, or"
                " delete it"
            )

    @property
    def _work(self) -> Path:
        return self.path / WORK

    @property
    def _plan(self) -> Path:
        return self._work / "plan.json"

    def _histories(self, number: int) -> Path:
        return self._work / "histories" / f"part-{number:05}.parquet"


def hash_histories(users: Iterable[UserHistory]) -> str:
    """Return the hash of users and their histories that a plan has of them."""
    digest = hashlib.sha256()
    for row in users:
        _update(digest, row)
    return digest.hexdigest()


def _update(digest: Any, row: UserHistory) -> None:
    digest.update(json.dumps(row).encode())
