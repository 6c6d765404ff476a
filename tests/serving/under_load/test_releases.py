"""Releases under load: no request fails, no answer mixes two releases, and a bad release changes nothing."""

import json
import shutil
import subprocess
import sys
import time

import pytest
from supervised import Load, ask, serving

from export.release import build_release
from export.repository import Export
from llamarec_client.canary import canary_model
from llamarec_client.contract import ENSEMBLE
from llamarec_client.errors import InvalidRequest
from llamarec_client.recommender import RecommenderClient
from models.retriever.options import RetrieverTraining
from models.retriever.training import train_retriever
from preprocessing.errors import InputError
from serving.contract import STORE_MODELS
from serving.errors import ReleaseError, ServerFailure, ServerUnreachable
from serving.layout import step_artifact
from serving.offline import ExportedSteps
from serving.server.releases import RELEASES, State, list_releases, promote, rollback
from serving.similar import SimilarItems

HISTORIES = [["50"], ["181", "50", "172"], [str(item) for item in range(1, 60)]]
OPTIONS = Export(threads=1)


@pytest.fixture(scope="module")
def other_artifacts(artifacts, tmp_path_factory):
    """Train another retriever on the same data and base, so that every user gets a different list."""
    from pipeline import BRIEF_RANKER, weighed
    from tiny import tiny_base

    from models.ranker.training import train_ranker

    folder = tmp_path_factory.mktemp("other") / "artifacts"
    shutil.copytree(artifacts / "data", folder / "data")
    train_retriever(RetrieverTraining(width=16, blocks=1, max_length=50, epochs=2, validate_every=15, seed=7), folder)
    with weighed(0.5):
        train_ranker(BRIEF_RANKER, folder, str(tiny_base(tmp_path_factory.mktemp("tiny-other"))))
    return folder


@pytest.fixture(scope="module")
def built(artifacts, other_artifacts, tmp_path_factory):
    """Build a repository with two releases, none of them promoted."""
    repository = tmp_path_factory.mktemp("releases")
    first = build_release(OPTIONS, artifacts, repository)
    assert first["name"] == "r1"
    for model in STORE_MODELS:
        assert (repository / model / "1" / "model.py").is_file()
    assert not [file for file in first["files"] if file.startswith(STORE_MODELS)], "they are part of no release"
    assert build_release(OPTIONS, other_artifacts, repository)["name"] == "r2"
    return repository


@pytest.fixture
def repository(built, tmp_path):
    """Copy the repository for one test."""
    return shutil.copytree(built, tmp_path / "releases")


@pytest.fixture(scope="module")
def expected(built):
    """Return the offline answers of both releases."""
    answers = {}
    for name in ("r1", "r2"):
        steps = ExportedSteps.load(built, f"_{name}")
        answers[name] = [steps.recommend(history) for history in HISTORIES]
    for first, second in zip(*answers.values(), strict=True):
        assert first != second, "the two releases can be told apart"
    return answers


def answering(url, expected, model=ENSEMBLE):
    """Return the release whose offline answer the server gives."""
    answer = ask(url, HISTORIES[0], model)
    return next(name for name, answers in expected.items() if answer == answers[0])


def promote_when_up(repository, name):
    """Promote the first release, and retry while the server is starting."""
    end = time.monotonic() + 60
    while True:
        try:
            return promote(repository, name)
        except (ServerFailure, ServerUnreachable) as error:
            starting = "does not answer" in str(error) or isinstance(error, ServerUnreachable)
            if not starting or time.monotonic() > end:
                raise
            time.sleep(0.2)


@pytest.mark.smoke
def test_promote_and_roll_back_under_load(repository, expected, tmp_path):
    """Promotions and a rollback while four clients send requests fail none of them.

    Every answer equals the offline answer of one of the two releases. After a restart the promoted one is served.
    """
    with serving(repository, tmp_path / "log", ready=False) as served:
        promote_when_up(repository, "r1")
        served.wait_until_ready()
        with Load(served.url, HISTORIES) as load:
            time.sleep(0.5)
            assert promote(repository, "r2") == State(current="r2", canary="r2", previous="r1", released=True)
            time.sleep(0.5)
            assert rollback(repository).current == "r1"
            time.sleep(0.5)
            assert promote(repository, "r2").current == "r2"
            time.sleep(0.5)
        assert load.failures() == []
        answered = {name for row in load.asked for name in expected if row.answer == expected[name][row.question]}
        assert answered == {"r1", "r2"}
        for row in load.asked:
            assert row.answer in (expected["r1"][row.question], expected["r2"][row.question])
        assert served.metric("llamarec_answers_total", step="ranker", release="r1") > 0
        assert served.metric("llamarec_answers_total", step="ranker", release="r2") > 0
    with serving(repository, tmp_path / "log") as served:
        assert answering(served.url, expected) == "r2"


def test_similar_items_are_those_of_the_release_that_is_served(repository, tmp_path):
    """The retriever of r2 was trained without signals and titles, and says so; `similar` always asks what is served,
    also after a restart.
    """
    exported = SimilarItems.load(step_artifact(repository, "neighbours", "_r1"))
    expected = [row.item.decode() for row in exported(b"50")]
    with serving(repository, tmp_path / "log", ready=False) as served:
        promote_when_up(repository, "r1")
        served.wait_until_ready()
        with RecommenderClient(served.url) as client:
            assert [row.item_id for row in client.similar("50")] == expected
            promote(repository, "r2", canary=True)
            assert [row.item_id for row in client.similar("50")] == expected
            with pytest.raises(InvalidRequest, match="neither transitions nor words of titles"):
                client.similar("50", model="similar_canary")
            promote(repository, "r2")
            with pytest.raises(InvalidRequest, match="neither transitions nor words of titles"):
                client.similar("50")
            rollback(repository)
            assert [row.item_id for row in client.similar("50")] == expected
    with serving(repository, tmp_path / "log") as served, RecommenderClient(served.url) as client:
        assert [row.item_id for row in client.similar("50")] == expected


def test_a_canary_answers_its_share_of_the_users(repository, expected, tmp_path):
    """`promote --canary` changes no user's answers until a client selects the canary; `rollback` ends the canary."""
    with serving(repository, tmp_path / "log", ready=False) as served:
        promote_when_up(repository, "r1")
        promote(repository, "r2", canary=True)
        users = [f"user {number}" for number in range(400)]
        chosen = [user for user in users if canary_model(ENSEMBLE, user, 0.05) != ENSEMBLE]
        assert answering(served.url, expected) == "r1"
        assert answering(served.url, expected, model=canary_model(ENSEMBLE, chosen[0], 0.05)) == "r2"
        assert rollback(repository) == State(current="r1", canary="r1", previous=None, released=True)
        assert answering(served.url, expected, model=canary_model(ENSEMBLE, chosen[0], 0.05)) == "r1"


@pytest.mark.parametrize("fault", ["probes", "parts", "file", "does not load"])
def test_a_bad_release_is_refused_and_the_old_one_goes_on(repository, expected, tmp_path, fault):
    """A release is refused, and the old one keeps answering, for each of four faults.

    They are answers that differ from those at build time (``probes``), a step of another export (``parts``), a changed
    file, and files that do not load.
    """
    manifest = repository / RELEASES / "r2.json"
    content = json.loads(manifest.read_text())
    if fault == "probes":
        content["probes"][0]["scores"] = content["probes"][0]["scores"][::-1]
    elif fault == "parts":
        part = repository / "features_r2" / "1" / "artifact" / "manifest.json"
        part.chmod(0o644)
        part.write_text(part.read_text().replace(content["release"], "0" * 16))
        del content["files"]["features_r2/1/artifact/manifest.json"]
    elif fault == "file":
        (repository / "prompt_builder_r2" / "1" / "artifact" / "prompt.json").chmod(0o644)
        (repository / "prompt_builder_r2" / "1" / "artifact" / "prompt.json").write_text("{}")
    else:
        (repository / "ranker_r2" / "1" / "artifact" / "merged" / "config.json").unlink()
        del content["files"]["ranker_r2/1/artifact/merged/config.json"]
    manifest.write_text(json.dumps(content))
    with serving(repository, tmp_path / "log", ready=False) as served:
        promote_when_up(repository, "r1")
        with Load(served.url, HISTORIES, clients=2) as load, pytest.raises((ReleaseError, ServerFailure), match="r2"):
            promote(repository, "r2")
        assert load.failures() == []
        assert all(row.answer == expected["r1"][row.question] for row in load.asked)
        assert State.read(repository).current == "r1"


def test_a_release_never_changes(built, artifacts):
    """The name of a release cannot be reused, and its files are read-only."""
    with pytest.raises(InputError, match="never changes"):
        build_release(OPTIONS, artifacts, built, "r1")
    files = [built / file for file in json.loads((built / RELEASES / "r1.json").read_text())["files"]]
    assert files
    assert not any(path.stat().st_mode & 0o222 for path in files)


def test_the_command_line_lists_and_explains(built):
    """`release list` prints one row per release; `promote` without a running server ends with exit code 2."""

    def run(*words):
        command = [sys.executable, "-m", "llamarec.cli", "release", *words, "--repository", str(built)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    listed = run("list", "--json")
    assert (
        [row["name"] for row in json.loads(listed.stdout)] == ["r1", "r2"] == [r["name"] for r in list_releases(built)]
    )
    refused = run("promote", "r1")
    assert refused.returncode == 2
    assert "llamarec serve" in refused.stderr
