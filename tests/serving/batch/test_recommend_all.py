"""Recommendations for all users: equal to the steps' answers, resumed after an interruption, refused where unfit."""

import errno
import fcntl
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from llamarec_client.contract import HISTORY, ITEM_ID, RETRIEVER_RANK, SCORE, TOP_K
from preprocessing.data import load_data
from preprocessing.errors import InputError
from serving.batch import partitions
from serving.batch.recommend_all import RecommendAll, recommend_all
from serving.batch.users import ArtifactUsers, StoreUsers, UserHistory
from serving.layout import exported_release, step_artifact
from serving.offline import ExportedSteps
from serving.steps.features import FeaturesStep
from serving.steps.retriever import RetrieverStep
from stores.address import open_store
from stores.store import AddedItem, Event, Listing, StoreError

NEW = AddedItem(b"star-wars-again", "Star Wars (1977)")


class Few:
    """A few users, whose histories a test may change."""

    source = "test"
    dataset = "movielens-100k"

    def __init__(self, **histories: list[str]) -> None:
        self.histories = histories

    def __iter__(self) -> Iterator[UserHistory]:
        return itertools.starmap(UserHistory, self.histories.items())


def few() -> Few:
    return Few(ann=["50", "181"], bob=[], cid=["172", "unknown"], dan=["1"], eve=["7", "7"])


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of all partitions, in order."""
    return [row for path in sorted((folder / "recommendations").iterdir()) for row in pq.read_table(path).to_pylist()]


def answers(folder: Path) -> dict[str, list[tuple[str, float, int]]]:
    """Return the answer of each user, in the form of :meth:`ExportedSteps.recommend`."""
    columns = ("items", "scores", "retriever_ranks")
    return {row["user"]: list(zip(*(row[name] for name in columns), strict=True)) for row in read(folder)}


def texts(*values: str) -> np.ndarray:
    return np.array([value.encode() for value in values], dtype=object)


# --- equality


def test_the_ranking_is_that_of_the_steps(repository, tmp_path):
    """Five users in partitions of two; the offline steps are the reference, which the server's answers equal."""
    users = few()
    manifest = recommend_all(RecommendAll(top_k=4, partition_size=2), repository, users, tmp_path / "out")
    steps = ExportedSteps.load(repository)
    assert answers(tmp_path / "out") == {row.user: steps.recommend(row.history, top_k=4) for row in users}
    assert [row["user"] for row in read(tmp_path / "out")] == ["ann", "bob", "cid", "dan", "eve"]
    names = sorted(path.name for path in (tmp_path / "out").rglob("*"))
    assert names == ["manifest.json", *(f"part-0000{part}.parquet" for part in range(3)), "recommendations"]
    assert manifest.options == {"stage": "ranking", "top_k": 4, "partition_size": 2}
    assert manifest.inputs["export"] == exported_release(repository)
    assert (manifest.facts["users"], manifest.facts["users_of_last_call"], manifest.facts["partitions"]) == (5, 5, 3)
    assert manifest.facts["users_per_second"] > 0


def test_the_retrieval_is_that_of_the_servers_own_steps(repository, tmp_path):
    """The objects that run in Triton answer the same histories: bit for bit, with added and hidden items too."""
    users, listing = few(), Listing(1, (NEW,), frozenset([b"50", b"258"]))
    recommend_all(RecommendAll(stage="retrieval"), repository, users, tmp_path / "out", listing=listing)
    features = FeaturesStep.load(step_artifact(repository, "features"))
    retriever = RetrieverStep.load(step_artifact(repository, "retriever"))
    for step in (features, retriever):
        step.items._made = step.items._make(listing)
    found = answers(tmp_path / "out")
    assert list(found) == list(users.histories)
    for user, history in users.histories.items():
        encoded = features.answer({HISTORY: texts(*history), TOP_K: np.array([20], np.int32)})
        given = {spec: np.asarray(value) for spec, value in encoded.items()}
        answer = retriever.answer(given)
        columns = (np.asarray(answer[spec]).tolist() for spec in (ITEM_ID, SCORE, RETRIEVER_RANK))
        assert found[user] == [(item.decode(), score, rank) for item, score, rank in zip(*columns, strict=True)]
        assert {item for item, _, _ in found[user]}.isdisjoint({"50", "258"})


def test_the_users_of_a_data_set_have_all_that_they_did(artifacts):
    """Training, validation and test items, in the order of the artifact."""
    data, users = load_data(artifacts), list(ArtifactUsers(artifacts))
    assert [row.user for row in users] == data.users
    for user in (0, 7, len(users) - 1):
        last = data.catalogue.raw(int(data.test[user])).decode()
        assert users[user].history == [*data.raw_history(user), last]


def test_the_users_of_a_store_are_those_with_events(tmp_path):
    """In the order of their ids' bytes, each with the history that a request by USER_ID is answered from."""
    with closing(open_store(f"sqlite:///{tmp_path}/store")) as store:
        store.record([(b"zoe", [Event(b"2", 9), Event(b"1", 8)]), ("Ö".encode(), [Event(b"3", 1)])])
        store.record([(b"gone", [Event(b"4", 1)])])
        users = StoreUsers(store)
        store.forget(b"gone")
        assert list(users) == [UserHistory("zoe", ["1", "2"]), UserHistory("Ö", ["3"])]
        assert users.dataset is None


# --- interruptions


class Answers:
    """Stands in for the models: an answer names its history, and one of a chosen user fails once."""

    def __init__(self, monkeypatch, fails_for: str | None = None) -> None:
        self.asked: list[list[str]] = []
        self.fails_for = fails_for
        monkeypatch.setattr("serving.batch.recommend_all.load_answer", lambda work, listing: self)

    def __call__(self, history):
        if self.fails_for in history:
            self.fails_for = None
            raise KeyboardInterrupt
        self.asked.append(history)
        return [(item, 0.5, 1) for item in history]


def test_an_interrupted_batch_goes_on_with_the_histories_that_it_began_with(repository, tmp_path, monkeypatch):
    """It ends at the third of five partitions. The second call computes the last three, and sees nothing of what
    happened since; a third one has nothing to do, and refuses the folder once it finds other histories.
    """
    models, users, options = Answers(monkeypatch, fails_for="172"), few(), RecommendAll(partition_size=1)
    with pytest.raises(KeyboardInterrupt):
        recommend_all(options, repository, users, tmp_path / "out")
    assert list(answers(tmp_path / "out")) == ["ann", "bob"]
    assert not (tmp_path / "out" / "manifest.json").exists()
    before = users.histories
    users.histories = {**before, "eve": ["later"], "fay": ["1"]}
    models.asked.clear()
    (tmp_path / "out" / ".manifest.json.17.partial").touch()  # of a call that was killed while it wrote
    manifest = recommend_all(options, repository, users, tmp_path / "out")
    assert models.asked == [["172", "unknown"], ["1"], ["7", "7"]]
    assert {user: [item for item, _, _ in answer] for user, answer in answers(tmp_path / "out").items()} == before
    assert (manifest.facts["users"], manifest.facts["users_of_last_call"]) == (5, 3)
    with pytest.raises(InputError, match=r"recommendations of .*, and the histories have changed since: name another"):
        recommend_all(options, repository, users, tmp_path / "out")
    users.histories = before
    assert recommend_all(options, repository, users, tmp_path / "out") == manifest
    assert len(models.asked) == 3


def test_a_full_disk_leaves_no_half_partition(repository, tmp_path, monkeypatch):
    """The disk fills in the middle of the second partition; the same call later writes what is missing."""
    models, written = Answers(monkeypatch), []

    def write_table(table, path, **options):
        written.append(path)
        if len(written) == 2:  # only once
            Path(path).write_bytes(b"PAR1 and no more")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        pq.write_table(table, path, **options)

    monkeypatch.setattr(partitions, "pq", SimpleNamespace(write_table=write_table))
    with pytest.raises(OSError, match="No space left"):
        recommend_all(RecommendAll(partition_size=2), repository, few(), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / "recommendations").iterdir()] == ["part-00000.parquet"]
    assert len(models.asked) == 4
    recommend_all(RecommendAll(partition_size=2), repository, few(), tmp_path / "out")
    assert list(answers(tmp_path / "out")) == list(few().histories)
    assert models.asked[4:] == [["172", "unknown"], ["1"], ["7", "7"]]


@pytest.mark.parametrize("interrupted", [True, False], ids=["unfinished", "finished"])
@pytest.mark.parametrize(
    ("named", "options", "listing"),
    [
        ("top_k", {"top_k": 3}, Listing(0, (), frozenset())),
        ("stage", {"stage": "retrieval"}, Listing(0, (), frozenset())),
        ("partition_size", {"partition_size": 3}, Listing(0, (), frozenset())),
        ("items", {}, Listing(1, (), frozenset([b"50"]))),
    ],
)
def test_the_folder_of_another_batch_is_refused(
    repository, tmp_path, monkeypatch, named, options, listing, interrupted
):
    models = Answers(monkeypatch, fails_for="172" if interrupted else None)
    given = {"partition_size": 2, "top_k": 2}
    with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
        recommend_all(RecommendAll(**given), repository, few(), tmp_path / "out")
    before, asked = read(tmp_path / "out"), len(models.asked)
    with pytest.raises(InputError, match=f"holds the recommendations of another {named}: name another folder"):
        recommend_all(RecommendAll(**{**given, **options}), repository, few(), tmp_path / "out", listing=listing)
    assert (read(tmp_path / "out"), len(models.asked)) == (before, asked)


def other_export(repository: Path, folder: Path) -> Path:
    """Return a copy of a repository whose manifests have the id of another export."""
    shutil.copytree(repository, folder, copy_function=os.link)
    for path in folder.glob("*/1/artifact/manifest.json"):
        content = json.loads(path.read_text())
        content["facts"]["release"] = "0123456789abcdef"
        path.unlink()  # and not the file that the link shares
        path.write_text(json.dumps(content))
    return folder


def test_the_folder_of_another_export_is_refused(repository, tmp_path, monkeypatch):
    Answers(monkeypatch)
    recommend_all(RecommendAll(), repository, few(), tmp_path / "out")
    with pytest.raises(InputError, match="the recommendations of another export: name another folder, or delete it"):
        recommend_all(RecommendAll(), other_export(repository, tmp_path / "other"), few(), tmp_path / "out")


def test_a_folder_of_something_else_is_left_alone(repository, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something else than recommendations: name a new folder"):
        recommend_all(RecommendAll(), repository, few(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_two_batches_do_not_share_a_folder(repository, tmp_path):
    (tmp_path / "out" / ".work").mkdir(parents=True)
    with (tmp_path / "out" / ".work" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"another `llamarec recommend-all` writes to .*: wait for it"):
            recommend_all(RecommendAll(), repository, few(), tmp_path / "out")


# --- bad input


def test_nobody_to_recommend_for_is_said(repository, tmp_path):
    with pytest.raises(InputError, match="there are no users to recommend for in the test: record events first"):
        recommend_all(RecommendAll(), repository, Few(), tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


def test_users_of_another_data_set_are_refused(repository, tmp_path):
    users = few()
    users.dataset = "films"
    with pytest.raises(InputError, match="exported from data set 'movielens-100k', and the users are of 'films'"):
        recommend_all(RecommendAll(), repository, users, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_more_items_than_a_server_returns_are_refused(repository, tmp_path):
    with pytest.raises(InputError, match="TOP_K is 21: ask for 1 to 20"):
        recommend_all(RecommendAll(top_k=21), repository, few(), tmp_path / "out")


def test_an_export_of_an_earlier_version_is_refused(repository, tmp_path):
    old = shutil.copytree(repository, tmp_path / "old", copy_function=os.link)
    adapter = old / "ranker" / "1" / "model.py"
    adapter.unlink()  # and not the file that the link shares
    adapter.write_text("from export.steps import Worker\n")
    with pytest.raises(InputError, match="was exported by an earlier version of llamarec: run `llamarec export"):
        recommend_all(RecommendAll(), old, few(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options", [{"stage": "both"}, {"partition_size": 0}], ids=["no such stage", "no users in a partition"]
)
def test_an_option_out_of_range_is_named(options):
    (name,) = options
    with pytest.raises(InputError, match=name):
        RecommendAll(**options)


def test_a_store_that_is_not_there_is_not_made(tmp_path):
    with closing(open_store(f"sqlite:///{tmp_path}/store")) as store, pytest.raises(StoreError, match="there is no"):
        StoreUsers(store)
    assert not any(tmp_path.iterdir())
