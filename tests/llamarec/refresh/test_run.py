"""The order of a refresh: what a repeated call goes on with, what a refusal leaves, and what is promoted.

The stages are replaced by ones that write a file and can end the process, as a kill would; they have tests of their
own, and test_drift.py runs the real ones.
"""

import errno
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from pipeline import BRIEF_RANKER, BRIEF_RETRIEVER

from llamarec.refresh import run
from llamarec.refresh.events import Source
from llamarec.refresh.judge import RANKING, RETRIEVAL, Comparison, Difference
from llamarec.refresh.run import PLAN, REPORT, Refresh, refresh
from models.ranker.options import RankerTraining
from models.retriever.options import RetrieverTraining
from preprocessing.artifacts import read_manifest
from preprocessing.errors import InputError
from serving.errors import ReleaseError, ServerFailure, ServerUnreachable
from serving.server.releases import State, manifest_path

STAGES = ("append", "train", "ranker", "export", "compare", "build", "promote")
EQUAL, WORSE = Difference(0.5, 0.5, 0.0, -0.1, 0.1), Difference(0.3, 0.5, -0.2, -0.3, -0.1)


class Killed(BaseException):
    """Ends a call as a kill does: nothing handles it."""


class Fakes:
    """Stages that note their calls; the one named by ``dies`` ends the call, before or after its work."""

    def __init__(self, folder: Path) -> None:
        self.calls: list[str] = []
        self.dies, self.after = "", False
        self.verdict = [EQUAL, EQUAL]
        self.server = True
        self.options = Refresh(source=Source(events=folder / "new.csv"), least_users=2)
        self.artifacts, self.repository = folder / "shop", folder / "releases"
        (folder / "new.csv").write_text("events")
        self.artifacts.mkdir()
        self.add_release("r1", "e1")
        State(current="r1", canary="r1", released=True).write(self.repository)

    def add_release(self, name: str, exported: str) -> None:
        path = manifest_path(self.repository, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"name": name, "release": exported, "dataset": "shop", "built": name}
        path.write_text(json.dumps(content))

    def stage(self, name: str, work=lambda: None):
        self.calls.append(name)
        if name == self.dies and not self.after:
            raise Killed
        result = work()
        if name == self.dies:
            raise Killed
        return result

    def names(self) -> list[str]:
        return sorted(path.name for path in self.artifacts.parent.iterdir() if not path.name.endswith(".lock"))

    def refresh(self, **changed):
        return refresh(replace(self.options, **changed), self.artifacts, self.repository)


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    fakes = Fakes(tmp_path)

    def compare(options, work, *_):
        return fakes.stage(
            "compare",
            lambda: (
                [Comparison(RETRIEVAL, 9, fakes.verdict[0], EQUAL), Comparison(RANKING, 9, fakes.verdict[1], EQUAL)],
                0,
            ),
        )

    def promote(repository, name, *, canary, servers):
        def switch():
            before = State.read(repository)
            after = replace(before, canary=name) if canary else State(name, name, before.current, True)
            after.write(repository)

        fakes.stage("promote", switch)

    def read(repository):
        if not fakes.server:
            raise ServerUnreachable("no server runs")
        return SimpleNamespace(url="server")

    replaced = {
        "check_release": run.release_manifest,
        "built_from": lambda artifacts, *_: artifacts,
        "append_events": lambda source, earlier, work: fakes.stage("append", (work / "data").mkdir),
        "load_data": lambda work: SimpleNamespace(name="shop"),
        "new_events": lambda *_: SimpleNamespace(count=9, judged=list(range(9))),
        "release_options": lambda *_: None,
        "_train_retriever": lambda options, earlier, work: fakes.stage("train", (work / "retriever").mkdir),
        "_make_ranker": lambda *given: fakes.stage("ranker", lambda: {"weight": 0.5}),
        "export": lambda options, work, to: fakes.stage("export", lambda: to.mkdir() or "e2"),
        "_compare": compare,
        "build_release": lambda options, work, repository, name: fakes.stage(
            "build", lambda: fakes.add_release(name, "e2")
        ),
        "promote": promote,
    }
    for name, function in replaced.items():
        monkeypatch.setattr(run, name, function)
    monkeypatch.setattr(run.Control, "read", read)
    # A stage that finds its finished work does nothing.
    for name in ("append_events", "_train_retriever", "export"):
        made = {"append_events": "data", "_train_retriever": "retriever", "export": "export"}[name]
        monkeypatch.setattr(run, name, unless_made(replaced[name], made, "e2"))
    return fakes


def unless_made(function, made, result):
    def call(*given):
        folder = next(path for path in given[::-1] if isinstance(path, Path))
        folder = folder if folder.name == made else folder / made
        return result if folder.exists() else function(*given)

    return call


def test_an_accepted_candidate_is_built_and_promoted(fakes):
    report = fakes.refresh()
    assert fakes.calls == list(STAGES)
    assert State.read(fakes.repository) == State("r2", "r2", "r1", True)
    assert fakes.names() == ["new.csv", "releases", "shop", "shop-2"]
    folder = fakes.artifacts.with_name("shop-2")
    assert report == {**json.loads((folder / REPORT).read_text()), "artifacts": str(folder)}
    assert (report["accepted"], report["release"], report["promoted"]) == (True, "r2", "current")
    assert not (folder / "export").exists()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_call_that_was_killed_anywhere_is_gone_on_with(fakes, stage, after):
    """Killed in each stage, before and after its work: the second call ends as if nothing had happened.

    No stage that was finished is repeated, except the ranker and the comparison, whose fakes keep nothing.
    """
    fakes.dies, fakes.after = stage, after
    with pytest.raises(Killed):
        fakes.refresh()
    assert State.read(fakes.repository).current == ("r2" if (stage, after) == ("promote", True) else "r1")
    before, fakes.calls, fakes.dies = fakes.calls, [], ""
    if (stage, after) == ("promote", True):
        assert fakes.names() == ["new.csv", "releases", "shop", "shop-2"]
        return
    report = fakes.refresh()
    assert (report["release"], report["promoted"]) == ("r2", "current")
    assert fakes.names() == ["new.csv", "releases", "shop", "shop-2"]
    assert sorted(path.name for path in (fakes.repository / ".releases").iterdir()) == [
        "r1.json",
        "r2.json",
        "state.json",
    ]
    kept = {"append", "train", "export", "build"} & set(before) - ({stage} if not after else set())
    assert not kept & set(fakes.calls)


@pytest.mark.parametrize("verdict", [[WORSE, EQUAL], [EQUAL, WORSE]], ids=["retrieval", "ranking"])
def test_a_worse_candidate_leaves_all_as_it_was(fakes, verdict):
    """Worse in one of the stages is enough. Its folder can be looked at until the next one is refused."""
    fakes.verdict = verdict
    for _ in range(2):
        report = fakes.refresh()
        assert (report["accepted"], report["release"], report["promoted"]) == (False, None, None)
        assert State.read(fakes.repository) == State("r1", "r1", None, True)
        assert fakes.names() == ["new.csv", "releases", "shop", "shop-refused"]
        assert not manifest_path(fakes.repository, "r2").exists()
    assert "build" not in fakes.calls
    fakes.verdict = [EQUAL, EQUAL]
    assert fakes.refresh()["release"] == "r2"


def test_other_events_start_anew(fakes):
    """What a killed call left belongs to other events, or to another way to refresh, and is not used."""
    fakes.dies = "ranker"
    for change in (lambda: None, lambda: (fakes.artifacts.parent / "new.csv").write_text("more events")):
        change()
        with pytest.raises(Killed):
            fakes.refresh()
    assert fakes.calls == ["append", "train", "ranker"] * 2
    fakes.calls = []
    with pytest.raises(Killed):
        fakes.refresh()
    assert fakes.calls == ["ranker"]
    fakes.dies = ""
    fakes.refresh(ranker=True)
    assert fakes.calls[1:3] == ["append", "train"]


def test_without_a_server_the_release_is_built_and_promoted_later(fakes):
    """The next call with the same events only promotes."""
    fakes.server = False
    report = fakes.refresh()
    assert (report["release"], report["promoted"]) == ("r2", None)
    assert State.read(fakes.repository).current == "r1"
    fakes.calls, fakes.server = [], True
    assert fakes.refresh()["promoted"] == "current"
    assert fakes.calls == ["promote"]


def test_a_canary(fakes):
    """It serves a share of the users beside the old release, with which the next candidate is compared too."""
    assert fakes.refresh(canary=True)["promoted"] == "canary"
    assert State.read(fakes.repository) == State("r1", "r2", None, True)
    assert fakes.refresh(canary=True)["release"] == "r3"


def test_a_release_that_was_promoted_meanwhile_is_not_replaced(fakes, monkeypatch):
    """The candidate was compared with r1."""
    built = run.build_release

    def build(*given):
        built(*given)
        fakes.add_release("r7", "e7")
        State("r7", "r7", "r1", True).write(fakes.repository)

    monkeypatch.setattr(run, "build_release", build)
    with pytest.raises(ReleaseError, match="r2 was compared with r1, but r7 is served by now"):
        fakes.refresh()
    assert "promote" not in fakes.calls


def test_a_server_that_refuses_leaves_the_release_to_be_promoted(fakes, monkeypatch):
    """The error is the promotion's own; the candidate is not lost."""

    def refuse(*_, **__):
        raise ServerFailure("release r2 is not promoted, r1 is still served: no memory")

    with monkeypatch.context() as patch:
        patch.setattr(run, "promote", refuse)
        with pytest.raises(ServerFailure, match="r1 is still served"):
            fakes.refresh()
    fakes.calls = []
    assert fakes.refresh()["promoted"] == "current"
    assert fakes.calls == ["promote"]


def test_bad_input_leaves_nothing_behind(fakes, monkeypatch):
    """Too few users, no served release, and a release that is gone."""
    with pytest.raises(InputError, match=r"new.csv has new last events of 9 users, .*: 10 are needed"):
        fakes.refresh(least_users=10)
    assert fakes.names() == ["new.csv", "releases", "shop"]
    with pytest.raises(ReleaseError, match="there is no release 'r9'"):
        fakes.refresh(release="r9")
    State(released=True).write(fakes.repository)
    with pytest.raises(ReleaseError, match=r"no release of .* is served: promote one"):
        fakes.refresh()
    with pytest.raises(InputError, match=r"nowhere/shop does not exist: name the first artifacts"):
        refresh(fakes.options, Path("nowhere/shop"), fakes.repository)
    with pytest.raises(InputError, match=r"new.csv does not exist: name a file or folder of new events"):
        fakes.refresh(release="r1", source=Source(events=Path("nowhere/new.csv")))
    assert fakes.names() == ["new.csv", "releases", "shop"]
    assert fakes.refresh(release="r1")["release"] == "r2", "named, it need not be served"


def test_a_full_disk_stops_the_refresh_and_the_next_call_goes_on(fakes, monkeypatch):
    """The error is the system's, which the command line turns into one sentence."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run, "_make_ranker", full)
        with pytest.raises(OSError, match="No space left"):
            fakes.refresh()
    assert [path.name for path in fakes.artifacts.parent.glob("shop*")] == ["shop"]
    assert json.loads((fakes.artifacts.with_name(".shop.refresh") / PLAN).read_text())["release"] == "e1"
    assert fakes.refresh()["release"] == "r2"
    assert fakes.calls.count("train") == 1


def test_the_options_of_the_last_trainings_are_used_again(artifacts):
    """What the artifacts record is what they were trained with, and options that they do not record get defaults."""
    retriever, ranker = (dict(read_manifest(artifacts / kind, kind, "").options) for kind in ("retriever", "ranker"))
    assert run._recorded(RetrieverTraining, retriever, device="cpu") == replace(BRIEF_RETRIEVER, device="cpu")
    assert run._recorded(RankerTraining, ranker, device="cpu") == replace(BRIEF_RANKER, device="cpu")
    del ranker["targets"], retriever["pool"]
    assert run._recorded(RankerTraining, ranker, device="cpu") == replace(BRIEF_RANKER, device="cpu")
    assert run._recorded(RetrieverTraining, retriever, device="cpu") == replace(BRIEF_RETRIEVER, device="cpu")


@pytest.mark.parametrize(
    ("option", "value"), [("least_users", 1), ("judge_users", -1)], ids=["least_users", "judge_users"]
)
def test_numbers_of_users_are_checked(option, value):
    with pytest.raises(InputError, match=f"{option} is {value}: give at least"):
        Refresh(source=Source(events=Path("new.csv")), **{option: value})
