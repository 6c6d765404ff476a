"""Promotion and rollback, step by step: real files of small releases, and a stand-in for the server's endpoint."""

import fcntl
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from echo import ADAPTER, ECHO_STEPS
from google.protobuf import text_format
from supervised import Load, ask, serving, wait_for
from tritonclient.grpc.model_config_pb2 import ModelConfig

from export.config import write_configs
from preprocessing.artifacts import new_artifact, sha256
from serving.contract import STEPS
from serving.errors import ReleaseError, ServerFailure, ServerUnreachable
from serving.layout import KIND, step_artifact
from serving.server.control import LOCK_FILE, Control
from serving.server.releases import (
    RELEASES,
    State,
    check_release,
    list_releases,
    promote,
    release_manifest,
    replay,
    rollback,
)

ENSEMBLES = ("llamarec", "llamarec_retrieval", "similar")
MODELS = ("features", "retriever", "prompt_builder", "ranker", "neighbours", *ENSEMBLES)
NEW = ("neighbours", "similar")
"""What releases of earlier versions do not have."""
ALIASES = [*ENSEMBLES, *(f"{ensemble}_canary" for ensemble in ENSEMBLES)]
ANSWERS = {"r1": {"50": 0.75, "181": 0.25}, "r2": {"181": 0.5, "172": 0.5}, "r3": {"1": 1.0}}
"""What each release answers to any history, item by score."""


def models(release: str) -> list[str]:
    """The models of a release in the order of a request, ensembles last."""
    return [f"{model}_{release}" for model in MODELS]


def write_release(repository: Path, name: str, built: str) -> None:
    """A release as `llamarec release build` leaves it, with a single small file for each step."""
    write_configs(repository, suffix=f"_{name}")
    for step in STEPS:
        folder = step_artifact(repository, step, f"_{name}")
        with new_artifact(folder, KIND, options={}, inputs={}, facts={"release": f"export of {name}"}) as partial:
            (partial / "weights").write_text(f"{step} of {name}")
    files = [path for model in models(name) for path in sorted((repository / model).rglob("*")) if path.is_file()]
    probe = {"history": ["50", "172"], "items": list(ANSWERS[name]), "scores": list(ANSWERS[name].values())}
    manifest = {
        "name": name,
        "release": f"export of {name}",
        "dataset": "movielens-100k",
        "built": built,
        "probes": [probe, {**probe, "history": []}],
        "files": {str(path.relative_to(repository)): sha256(path) for path in files},
    }
    (repository / RELEASES).mkdir(exist_ok=True)
    (repository / RELEASES / f"{name}.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Three releases, nothing promoted; r1 was built last, so that names and times are in different orders."""
    folder = tmp_path_factory.mktemp("releases")
    for name, built in (("r2", "2026-01-01"), ("r3", "2026-01-02"), ("r1", "2026-01-03")):
        write_release(folder, name, f"{built}T12:00:00+00:00")
    return folder


@pytest.fixture
def repository(built, tmp_path) -> Path:
    """A copy of them for one test."""
    return shutil.copytree(built, tmp_path / "releases")


class Server:
    """Stands in for a running server's HTTP endpoint: records what it is told to do, and what the files then say."""

    def __init__(self, repository: Path, url: str = "a:8000") -> None:
        self.repository = repository
        self.url = url
        self.told: list[tuple[str, str]] = []
        self.aliases: dict[str, str] = {}
        """The release behind each alias, as its configuration said when it was loaded last."""
        self.loaded: set[str] = set()
        self.failing: Callable[[str], bool] = lambda model: False
        """Whether a model does not load."""
        self.at_load: Callable[[str], Any] = lambda model: None
        self.answers = {f"llamarec_{name}": dict(items) for name, items in ANSWERS.items()}

    def load(self, model: str) -> None:
        self.told.append(("load", model))
        self.at_load(model)
        if self.failing(model):
            raise ServerFailure(f"failed to load '{model}'")
        self.loaded.add(model)
        if model in ALIASES:
            self.aliases[model] = self.written(model)

    def unload(self, model: str) -> None:
        self.told.append(("unload", model))
        self.loaded.discard(model)

    def infer(self, model: str, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        self.told.append(("ask", model))
        (tensor,) = request["inputs"]
        assert (tensor["name"], tensor["datatype"]) == ("HISTORY", "BYTES")
        assert tensor["shape"] == [1, len(tensor["data"])]
        items = self.answers[model]
        return {"outputs": [{"name": "SCORE", "data": [*items.values()]}, {"name": "ITEM_ID", "data": [*items]}]}

    def written(self, alias: str) -> str:
        """The release whose steps an alias's configuration lists."""
        text = (self.repository / alias / "config.pbtxt").read_text()
        config = text_format.Parse(text, ModelConfig())
        assert config.name == alias
        (name,) = {step.model_name.rpartition("_")[2] for step in config.ensemble_scheduling.step}
        return name

    def releases(self) -> set[str]:
        """The releases that are held in memory, each of them whole."""
        names = {model.rpartition("_")[2] for model in self.loaded} & set(ANSWERS)
        assert all(set(models(name)) <= self.loaded for name in names)
        return names


@pytest.fixture
def server(repository, monkeypatch) -> Server:
    server = Server(repository)

    def read(folder: Path) -> Server:
        assert folder == repository
        return server

    monkeypatch.setattr(Control, "read", read)
    return server


def pairs(llamarec: str, canary: str) -> dict[str, str]:
    """What the six aliases stand for."""
    return dict(zip(ALIASES, [llamarec] * 3 + [canary] * 3, strict=True))


def by_hand(text: str) -> State:
    """``r1/r2/r3``: current, canary and previous release, ``-`` for none."""
    current, canary, previous = (None if name == "-" else name for name in text.split("/"))
    return State(current, canary, previous, released=True)


# --- the state


@pytest.mark.parametrize("state", ["r1/r1/-", "r2/r2/r1", "r1/r2/-", "r3/r2/r1", "-/-/-"])
def test_a_state_survives_a_restart(tmp_path, state):
    """What was written is what is read back."""
    by_hand(state).write(tmp_path)
    assert State.read(tmp_path) == by_hand(state)


def test_a_repository_without_releases_serves_all_it_has(tmp_path):
    """`llamarec export` leaves no folder of releases: no list of models, so that the server loads everything."""
    state = State.read(tmp_path)
    assert state == State()
    assert state.models(tmp_path) is None


def test_a_repository_of_releases_serves_none_until_one_is_promoted(repository):
    """Built but not promoted: an empty list, because everything would be every release at once."""
    state = State.read(repository)
    assert state == State(released=True)
    assert state.models(repository) == []


@pytest.mark.parametrize(
    ("state", "aliases", "loaded"),
    [
        ("-/-/-", [], []),
        ("r1/r1/-", ["r1", "r1", "r1", "r1", "r1", "r1"], ["r1"]),
        ("r2/r2/r1", ["r2", "r2", "r2", "r2", "r2", "r2"], ["r2", "r1"]),
        ("r1/r2/-", ["r1", "r1", "r1", "r2", "r2", "r2"], ["r1", "r2"]),
        ("r1/r2/r2", ["r1", "r1", "r1", "r2", "r2", "r2"], ["r1", "r2"]),
        ("r1/r2/r3", ["r1", "r1", "r1", "r2", "r2", "r2"], ["r1", "r2", "r3"]),
    ],
)
def test_what_a_server_loads_when_it_starts(repository, state, aliases, loaded):
    """By hand for every combination: the six aliases, then the ensembles of each release that is current, canary or
    previous, once each; the steps come with their ensembles.
    """
    state = by_hand(state)
    stand_for = [f"{ensemble}_{name}" for ensemble, name in zip(ENSEMBLES * 2, aliases, strict=False)]
    assert state.aliases(repository) == list(zip(ALIASES, stand_for, strict=False))
    assert state.loaded() == loaded
    expected = [f"{ensemble}_{name}" for name in loaded for ensemble in ENSEMBLES]
    assert state.models(repository) == ALIASES[: len(aliases)] + expected


# --- what there is


def test_releases_are_listed_in_the_order_in_which_they_were_built(repository):
    """Oldest first whatever their names; the state is no release, and each row says what the release serves as."""
    by_hand("r2/r2/r1").write(repository)
    rows = list_releases(repository)
    assert [(row["name"], row["serves as"]) for row in rows] == [
        ("r2", "current, canary"),
        ("r3", ""),
        ("r1", "previous"),
    ]
    assert rows[0] == {
        "name": "r2",
        "release": "export of r2",
        "dataset": "movielens-100k",
        "built": "2026-01-01T12:00:00+00:00",
        "serves as": "current, canary",
    }


def test_a_repository_without_releases_lists_none(tmp_path):
    assert list_releases(tmp_path) == []


def test_an_unknown_release_is_refused_with_those_that_are_there(repository, tmp_path_factory):
    with pytest.raises(ReleaseError, match=r"'r9'.*r2, r3, r1"):
        release_manifest(repository, "r9")
    with pytest.raises(ReleaseError, match=r"'r1'.*none"):
        release_manifest(tmp_path_factory.mktemp("empty"), "r1")


def test_a_release_that_is_as_it_was_built_is_accepted(repository):
    assert check_release(repository, "r1") == json.loads((repository / RELEASES / "r1.json").read_text())


@pytest.mark.parametrize("model", models("r1"))
def test_a_missing_file_is_named(repository, model):
    """Any file of any model: the manifest knows them all."""
    path = repository / model / "config.pbtxt"
    path.unlink()
    with pytest.raises(ReleaseError, match=re.escape(str(path))):
        check_release(repository, "r1")


def test_a_file_that_was_changed_is_named(repository):
    """The hash tells, though length and name are the same."""
    path = step_artifact(repository, "ranker", "_r1") / "weights"
    path.write_text(path.read_text().replace("r1", "rX"))
    with pytest.raises(ReleaseError, match=re.escape(str(path))):
        check_release(repository, "r1")
    check_release(repository, "r2")


def test_a_step_of_another_export_is_named(repository):
    """The manifest's hashes fit the files, and still one of the steps came from elsewhere."""
    folder, other = (step_artifact(repository, "retriever", suffix) for suffix in ("_r1", "_r2"))
    path = repository / RELEASES / "r1.json"
    manifest = json.loads(path.read_text())
    for file in ("manifest.json", "weights"):
        (folder / file).write_bytes((other / file).read_bytes())
        manifest["files"][str((folder / file).relative_to(repository))] = sha256(folder / file)
    path.write_text(json.dumps(manifest))
    with pytest.raises(ReleaseError, match="retriever"):
        check_release(repository, "r1")


def test_a_step_without_a_manifest_is_one_sentence_of_a_release(repository):
    """The manifest of the release, made by hand, does not know the step's; it was an error of another kind, with the
    remedy of `llamarec export`.
    """
    folder = step_artifact(repository, "ranker", "_r1")
    (folder / "manifest.json").unlink()
    path = repository / RELEASES / "r1.json"
    manifest = json.loads(path.read_text())
    del manifest["files"][str((folder / "manifest.json").relative_to(repository))]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ReleaseError, match=f"{re.escape(str(folder))} is no exported step; build a new release"):
        check_release(repository, "r1")


# --- replaying the probes


class Answering:
    """A control whose model answers every question with the given items and scores."""

    def __init__(self, items: list[str], scores: list[float]) -> None:
        self.outputs = [{"name": "ITEM_ID", "data": items}, {"name": "SCORE", "data": scores}]

    def infer(self, model: str, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        return {"outputs": self.outputs}


PROBE = {"history": ["50"], "items": ["1", "2"], "scores": [0.75, 0.25]}


@pytest.mark.parametrize(
    ("items", "scores"),
    [(["1", "2"], [0.75, 0.25]), (["1", "2"], [0.741, 0.259]), (["2", "1"], [0.25, 0.75])],
    ids=["the same", "off by 0.009", "in another order"],
)
def test_what_another_processor_may_change_is_accepted(items, scores):
    """Probabilities within a hundredth; nearly equal ones may change places."""
    replay(Answering(items, scores), "llamarec_r1", [PROBE])


@pytest.mark.parametrize(
    ("items", "scores"),
    [
        (["1", "2"], [0.739, 0.261]),
        (["1", "3"], [0.75, 0.25]),
        (["1"], [0.75]),
        (["1", "2", "3"], [0.75, 0.25, 0.0]),
        ([], []),
    ],
    ids=["off by 0.011", "another item", "an item less", "an item more", "nothing"],
)
def test_another_answer_than_at_building_is_refused(items, scores):
    """More than a hundredth, or other items: something but the processor has changed."""
    with pytest.raises(ServerFailure, match="llamarec_r1"):
        replay(Answering(items, scores), "llamarec_r1", [PROBE])


def test_a_probe_without_an_answer_must_stay_without():
    """A user who has seen everything: an empty answer is the right one."""
    replay(Answering([], []), "llamarec_r1", [{"history": ["50"], "items": [], "scores": []}])


# --- promotion


def test_the_first_promotion_in_order(repository, server):
    """Steps before ensembles, so that none is loaded implicitly; then two probes; and only then what callers ask."""
    state = promote(repository, "r1")
    assert server.told == [
        *(("load", model) for model in models("r1")),
        *[("ask", "llamarec_r1")] * 2,
        *(("load", alias) for alias in ALIASES),
    ]
    assert server.aliases == pairs("r1", "r1")
    assert state == State.read(repository) == by_hand("r1/r1/-")


def test_the_retrievers_graph_is_loaded_and_unloaded_with_its_release(repository, server):
    """With ``--retriever-runtime onnxruntime``, a model of its own runs the graph. No ensemble contains it, so Triton
    loads it only when it is told to: before the step that calls it, at a promotion and when the server starts again.
    """
    (repository / "retriever_scores_r1").mkdir()
    promote(repository, "r1")
    assert server.told[:2] == [("load", "retriever_scores_r1"), ("load", "features_r1")]
    assert "retriever_scores_r1" in State.read(repository).models(repository)
    promote(repository, "r2")
    promote(repository, "r3")
    assert server.told[-1] == ("unload", "retriever_scores_r1")
    assert "retriever_scores_r1" not in server.loaded
    assert "retriever_scores_r1" not in State.read(repository).models(repository)


@pytest.mark.parametrize("present", [["events", "items"], ["events"]])
def test_the_store_is_changed_beside_all_releases(repository, server, present):
    """Both models are loaded with the first promotion and whenever the server starts, and no release unloads them. A
    repository of an older version has no `items`.
    """
    for model in present:
        (repository / model).mkdir()
        (repository / model / "config.pbtxt").touch()
    promote(repository, "r1")
    assert server.told[: len(present) + 1] == [*(("load", model) for model in present), ("load", "features_r1")]
    promote(repository, "r2")
    promote(repository, "r3")
    assert set(present) <= server.loaded
    started = State.read(repository).models(repository)
    assert [model for model in started if model in ("events", "items")] == present


def of_an_earlier_version(repository: Path, name: str) -> None:
    """Turn a release into one of a version that had no ``similar``."""
    path = repository / RELEASES / f"{name}.json"
    manifest = json.loads(path.read_text())
    manifest["files"] = {file: digest for file, digest in manifest["files"].items() if file.split("_")[0] not in NEW}
    path.write_text(json.dumps(manifest))
    for model in NEW:
        shutil.rmtree(repository / f"{model}_{name}")


def test_a_release_of_an_earlier_version_ends_what_it_does_not_have(repository, server):
    """Nothing answers from r1 any more, neither now nor after a restart; the next release has it again."""
    of_an_earlier_version(repository, "r2")
    promote(repository, "r1")
    assert server.aliases == pairs("r1", "r1")
    promote(repository, "r2")
    recommending = {alias for alias in ALIASES if not alias.startswith("similar")}
    assert server.loaded & set(ALIASES) == recommending
    assert server.loaded >= set(models("r1")), "for a rollback"
    started = State.read(repository).models(repository)
    assert [model for model in started if model.startswith("similar")] == ["similar_r1"]
    rollback(repository)
    assert server.loaded & set(ALIASES) == set(ALIASES)
    assert server.aliases == pairs("r1", "r1")


def test_a_canary_of_an_earlier_version_is_asked_for_recommendations_only(repository, server):
    of_an_earlier_version(repository, "r2")
    promote(repository, "r1")
    promote(repository, "r2", canary=True)
    assert server.loaded & set(ALIASES) == set(ALIASES) - {"similar_canary"}
    assert server.aliases["similar"] == "r1"
    assert server.aliases["llamarec_canary"] == "r2"


def test_the_release_that_was_current_stays_loaded(repository, server):
    """For a rollback; the one before it is unloaded, ensembles first because they hold on to their steps."""
    promote(repository, "r1")
    assert promote(repository, "r2") == by_hand("r2/r2/r1")
    assert server.aliases == pairs("r2", "r2")
    assert server.releases() == {"r1", "r2"}
    server.told.clear()
    assert promote(repository, "r3") == State.read(repository) == by_hand("r3/r3/r2")
    assert server.told[-len(MODELS) :] == [("unload", model) for model in reversed(models("r1"))]
    assert server.releases() == {"r2", "r3"}


def test_promoting_the_current_release_again_changes_nothing(repository, server):
    """What a rollback returns to is still the release before, and not the current one itself."""
    promote(repository, "r1")
    promote(repository, "r2")
    assert promote(repository, "r2") == by_hand("r2/r2/r1")
    assert server.releases() == {"r1", "r2"}


def test_no_step_is_healed_while_the_aliases_change(repository, server):
    """The lock is held alone from the first alias to the last, and not while the models load, which takes longer."""

    def healing_may_start(model: str) -> None:
        with (repository / LOCK_FILE).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                free.append(model)
            except BlockingIOError:
                held.append(model)

    free: list[str] = []
    held: list[str] = []
    server.at_load = healing_may_start
    promote(repository, "r1")
    assert free == models("r1")
    assert held == ALIASES


def test_the_state_changes_after_the_last_alias(repository, server):
    """A server that is started again in between loads the old state's releases, and all of them are still there."""
    promote(repository, "r1")
    seen: list[State] = []
    server.at_load = lambda model: seen.append(State.read(repository))
    promote(repository, "r2")
    assert set(seen) == {by_hand("r1/r1/-")}


def test_a_release_that_answers_otherwise_than_when_it_was_built_is_not_promoted(repository, server):
    """What was served goes on untouched, and the new release's models are unloaded again."""
    promote(repository, "r1")
    server.answers["llamarec_r2"]["181"] += 0.02
    server.told.clear()
    with pytest.raises(ServerFailure, match=r"r2 .*r1.*llamarec_r2"):
        promote(repository, "r2")
    assert server.told == [
        *(("load", model) for model in models("r2")),
        ("ask", "llamarec_r2"),
        *(("unload", model) for model in reversed(models("r2"))),
    ]
    assert server.aliases == pairs("r1", "r1")
    assert State.read(repository) == by_hand("r1/r1/-")


def test_a_release_that_does_not_load_is_not_promoted(repository, server):
    """The server's own words are in the error; what had been loaded is unloaded."""
    promote(repository, "r1")
    server.failing = lambda model: model == "prompt_builder_r2"
    with pytest.raises(ServerFailure, match="failed to load 'prompt_builder_r2'"):
        promote(repository, "r2")
    assert server.releases() == {"r1"}
    assert State.read(repository) == by_hand("r1/r1/-")


def test_a_release_that_is_still_loaded_is_not_unloaded_when_it_is_refused(repository, server):
    """It is what a rollback would return to, or answers a canary's users."""
    promote(repository, "r1")
    promote(repository, "r2", canary=True)
    server.answers["llamarec_r2"]["181"] += 0.02
    with pytest.raises(ServerFailure):
        promote(repository, "r2")
    assert server.releases() == {"r1", "r2"}
    assert server.aliases == pairs("r1", "r2")


@pytest.mark.parametrize("alias", ALIASES)
def test_a_flip_that_fails_is_taken_back(repository, server, alias):
    """Whichever alias does not load: all four stand for r1 again, on disk as on the server, and so does the state;
    r2 is unloaded.
    """
    promote(repository, "r1")
    server.failing = lambda model: model == alias and server.written(alias) == "r2"
    with pytest.raises(ServerFailure, match=rf"r1.*failed to load '{alias}'"):
        promote(repository, "r2")
    assert {name: server.written(name) for name in ALIASES} == pairs("r1", "r1")
    assert server.aliases == pairs("r1", "r1")
    assert server.releases() == {"r1"}
    assert State.read(repository) == by_hand("r1/r1/-")


def test_a_bad_release_is_refused_before_anything_is_loaded(repository, server):
    """A file that was changed costs the server nothing."""
    (step_artifact(repository, "features", "_r1") / "weights").write_text("other")
    with pytest.raises(ReleaseError, match="features_r1"):
        promote(repository, "r1")
    with pytest.raises(ReleaseError, match="r9"):
        promote(repository, "r9")
    assert server.told == []


def test_without_a_server_nothing_is_promoted(repository):
    """No stand-in here: no server left its address beside the models, and the error says how to start one."""
    with pytest.raises(ServerUnreachable, match="llamarec serve"):
        promote(repository, "r1")
    assert State.read(repository) == State(released=True)


# --- canaries


def test_a_canary_moves_its_own_aliases_only(repository, server):
    """`llamarec` stays with r1, `llamarec_canary` becomes r2, and what a rollback returns to stays what it was."""
    promote(repository, "r3")
    promote(repository, "r1")
    assert promote(repository, "r2", canary=True) == State.read(repository) == by_hand("r1/r2/r3")
    assert server.aliases == pairs("r1", "r2")
    assert server.releases() == {"r1", "r2", "r3"}


def test_another_canary_takes_the_first_ones_place(repository, server):
    """Only the release under trial changes, and the one that was tried before is unloaded."""
    promote(repository, "r1")
    promote(repository, "r2", canary=True)
    assert promote(repository, "r3", canary=True) == by_hand("r1/r3/-")
    assert server.aliases == pairs("r1", "r3")
    assert server.releases() == {"r1", "r3"}


def test_a_canary_that_proved_itself_becomes_current(repository, server):
    """Both pairs of aliases stand for it, and the release before is kept."""
    promote(repository, "r1")
    promote(repository, "r2", canary=True)
    assert promote(repository, "r2") == by_hand("r2/r2/r1")
    assert server.aliases == pairs("r2", "r2")


def test_a_canary_of_an_empty_server_is_current_too(repository, server):
    """There is nothing else that `llamarec` could answer with."""
    assert promote(repository, "r1", canary=True) == by_hand("r1/r1/-")
    assert server.aliases == pairs("r1", "r1")


# --- rollback


def test_a_rollback_ends_a_canary_first(repository, server):
    """Its users go back to the current release, which needs no probe; the canary is unloaded, the one before stays."""
    promote(repository, "r3")
    promote(repository, "r1")
    promote(repository, "r2", canary=True)
    server.told.clear()
    assert rollback(repository) == State.read(repository) == by_hand("r1/r1/r3")
    assert server.told == [
        *(("load", alias) for alias in ALIASES),
        *(("unload", model) for model in reversed(models("r2"))),
    ]
    assert server.aliases == pairs("r1", "r1")


def test_a_canary_that_is_also_the_release_before_stays_loaded(repository, server):
    """The release before may be tried again: ending that trial must not take away what a rollback returns to."""
    promote(repository, "r2")
    promote(repository, "r1")
    assert promote(repository, "r2", canary=True) == by_hand("r1/r2/r2")
    assert rollback(repository) == by_hand("r1/r1/r2")
    assert server.releases() == {"r1", "r2"}


def test_a_rollback_returns_to_the_release_before(repository, server):
    """Its probes are replayed as at any promotion; a second rollback returns to where the first one started."""
    promote(repository, "r1")
    promote(repository, "r2")
    server.told.clear()
    assert rollback(repository) == State.read(repository) == by_hand("r1/r1/r2")
    assert ("ask", "llamarec_r1") in server.told
    assert server.aliases == pairs("r1", "r1")
    assert rollback(repository) == by_hand("r2/r2/r1")
    assert server.releases() == {"r1", "r2"}


def test_a_rollback_that_fails_leaves_what_was_served(repository, server):
    """An alias does not load: the canary goes on, and nothing is unloaded."""
    promote(repository, "r1")
    promote(repository, "r2", canary=True)
    server.failing = lambda model: model == "llamarec_canary" and server.written(model) == "r1"
    with pytest.raises(ServerFailure):
        rollback(repository)
    assert server.aliases == pairs("r1", "r2")
    assert server.releases() == {"r1", "r2"}
    assert State.read(repository) == by_hand("r1/r2/-")


def test_with_nothing_to_go_back_to_nothing_is_done(repository, server):
    """No release at all, or a single one: the error says so, and the server is not asked."""
    with pytest.raises(ReleaseError, match="no release was promoted yet"):
        rollback(repository)
    promote(repository, "r1")
    server.told.clear()
    with pytest.raises(ReleaseError, match="r1"):
        rollback(repository)
    assert server.told == []
    assert State.read(repository) == by_hand("r1/r1/-")


# --- several servers


@pytest.fixture
def three(repository) -> list[Server]:
    """Three servers of one folder, which serve r1."""
    servers = [Server(repository, f"{name}:8000") for name in "abc"]
    promote(repository, "r1", servers=servers)
    return servers


def test_no_server_switches_before_all_have_answered_the_probes(repository, three):
    """All models of r2 are loaded, and its two probes asked, at a, b and c; only then the first alias changes."""
    order: list[tuple[str, str]] = []
    for server in three:
        server.at_load = lambda model, url=server.url: order.append((url, model))
    assert promote(repository, "r2", servers=three) == by_hand("r2/r2/r1")
    loads = [(server.url, model) for server in three for model in models("r2")]
    assert order[: len(loads)] == loads
    assert order[len(loads) :] == [(server.url, alias) for alias in ALIASES for server in three]
    for server in three:
        assert server.told.count(("ask", "llamarec_r2")) == 2
        assert server.aliases == pairs("r2", "r2")
        assert server.releases() == {"r1", "r2"}


def test_a_server_that_refuses_the_release_keeps_all_from_it(repository, three):
    """Server b answers a probe otherwise than when the release was built; the error names it, and a unloads r2."""
    three[1].answers["llamarec_r2"]["181"] += 0.02
    with pytest.raises(ServerFailure, match=r"r2 is not promoted, r1 is still served: the server at b:8000: .*probe"):
        promote(repository, "r2", servers=three)
    for server in three:
        assert server.aliases == pairs("r1", "r1")
        assert server.releases() == {"r1"}
    assert State.read(repository) == by_hand("r1/r1/-")


@pytest.mark.parametrize("alias", ALIASES)
def test_servers_that_switched_are_switched_back(repository, three, alias):
    """Whichever alias b does not load: all of them serve r1 again, and the error names b."""
    three[1].failing = lambda model: model == alias and three[1].written(alias) == "r2"
    with pytest.raises(ServerFailure, match=rf"undone, r1 is still served: the server at b:8000: .*'{alias}'"):
        promote(repository, "r2", servers=three)
    for server in three:
        assert server.aliases == pairs("r1", "r1")
        assert server.releases() == {"r1"}
    assert {name: three[0].written(name) for name in ALIASES} == pairs("r1", "r1")
    assert State.read(repository) == by_hand("r1/r1/-")


def test_a_server_that_dies_midway_switches_the_others_back(repository, three):
    """Server c dies after the first alias. It cannot be told anything, but finds r1 in the folder when it restarts."""
    dead: list[bool] = []
    three[2].at_load = lambda model: dead.append(True) if model == ALIASES[1] and not dead else None
    three[2].failing = lambda model: bool(dead)
    with pytest.raises(ServerFailure, match=r"undone, except at c:8000: restart it, r1 .*the server at c:8000"):
        promote(repository, "r2", servers=three)
    assert [server.aliases for server in three[:2]] == [pairs("r1", "r1")] * 2
    assert {name: three[2].written(name) for name in ALIASES} == pairs("r1", "r1")
    assert State.read(repository) == by_hand("r1/r1/-")


def test_a_first_release_that_one_server_refuses_is_served_by_none(repository):
    """There is nothing to switch back to: the aliases of the others are unloaded."""
    servers = [Server(repository, f"{name}:8000") for name in "ab"]
    servers[1].failing = lambda model: model == ALIASES[1]
    with pytest.raises(ServerFailure, match="no release is served yet: the server at b:8000"):
        promote(repository, "r1", servers=servers)
    assert not set(ALIASES) & servers[0].loaded
    assert State.read(repository) == State(released=True)


def test_a_rollback_of_several_servers(repository, three):
    """A canary ends, and a promotion is taken back, at all of them."""
    promote(repository, "r2", canary=True, servers=three)
    assert rollback(repository, servers=three) == by_hand("r1/r1/-")
    promote(repository, "r2", servers=three)
    assert rollback(repository, servers=three) == by_hand("r1/r1/r2")
    assert [server.aliases for server in three] == [pairs("r1", "r1")] * 3


def test_several_servers_have_one_key(tmp_path):
    """It is given, or the one that the last of them wrote to their folder; addresses are checked."""
    Control("127.0.0.1:8000", "written").write(tmp_path)
    assert Control.several(tmp_path, ["a:8000", "b:1", "a:8000"]) == [
        Control("a:8000", "written"),
        Control("b:1", "written"),
    ]
    assert Control.several(tmp_path, ["a:8000"], "given") == [Control("a:8000", "given")]
    assert Control.several(tmp_path, []) == []
    for address in ("a", "", "http://a:8000", "a:http"):
        with pytest.raises(ServerUnreachable, match="give HOST:PORT"):
            Control.several(tmp_path, [address])


@pytest.fixture
def echoing(tmp_path) -> Path:
    """Write two releases whose steps echo: r1 answers with the history backwards, and r2 as it is."""
    repository = tmp_path / "releases"
    for name, order in (("r1", "[::-1]"), ("r2", "")):
        write_release(repository, name, "2026-01-01T12:00:00+00:00")
        for step, methods in ECHO_STEPS.items():
            code = ADAPTER.format(step=step) + methods.replace("[::-1]", order)
            (repository / f"{step}_{name}" / "1" / "model.py").write_text(code)
        path = repository / RELEASES / f"{name}.json"
        items = ["b", "a"] if order else ["a", "b"]
        probe = {"history": ["a", "b"], "items": items, "scores": [-1.0, 0.0] if order else [0.0, -1.0]}
        path.write_text(json.dumps({**json.loads(path.read_text()), "probes": [probe]}))
    return repository


@pytest.mark.serving
def test_two_real_servers_switch_together_or_not_at_all(echoing, tmp_path):
    """Both serve one folder and answer throughout. Then the second one is killed in the middle of a switch: the first
    one goes back to the release before, and so does the second one, when its supervisor starts it again.
    """
    key = {"LLAMAREC_ADMIN_KEY": "k"}
    with serving(echoing, tmp_path / "log 1", ready=False, environment=key) as first, ExitStack() as open_:
        assert wait_for(Control(first.http_url, "k").is_ready, 60)
        promote(echoing, "r1")
        second = open_.enter_context(serving(echoing, tmp_path / "log 2", environment=key))
        controls = Control.several(echoing, [first.http_url, second.http_url], "k")
        with Load(first.url, [["a", "b"]], 2) as one, Load(second.url, [["a", "b"]], 2) as other:
            promote(echoing, "r2", servers=controls)
        assert one.failures() == other.failures() == []
        orders = [[item for item, *_ in ask(server.url, ["a", "b"])] for server in (first, second)]
        assert orders == [["a", "b"]] * 2

        class Dying(Control):
            def load(self, model: str, config: dict[str, Any] | None = None, timeout: float = 600.0) -> None:
                if model == ALIASES[1]:
                    tasks = Path(f"/proc/{second.process.pid}/task").glob("*/children")
                    (server,) = [int(pid) for task in tasks for pid in task.read_text().split()]
                    os.kill(server, signal.SIGKILL)
                super().load(model, config, timeout)

        with pytest.raises(ServerFailure, match=f"undone, except at {second.http_url}"):
            promote(echoing, "r1", servers=[controls[0], Dying(second.http_url, "k")])
        assert State.read(echoing).current == "r2"
        assert ask(first.url, ["a", "b"])[0][0] == "a"
        assert wait_for(lambda: second.health()[0] != 200, 30), "its supervisor has seen that it was killed"
        second.wait_until_ready(60)
        assert ask(second.url, ["a", "b"])[0][0] == "a"
