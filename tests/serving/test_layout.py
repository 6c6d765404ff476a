"""Where a step's files stand, that they belong together, and that this version can run them."""

import shutil
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from export.config import REPOSITORY
from preprocessing.artifacts import new_artifact
from preprocessing.errors import InputError
from serving.contract import STEPS
from serving.layout import (
    KIND,
    check_adapters,
    export_id,
    exported_release,
    loaded_artifact,
    parameter,
    passes_users,
    step_artifact,
)

OLD_ADAPTER = '''"""Triton step: raw ids to item numbers."""

from export.steps import FeaturesStep, Worker


class TritonPythonModel:
    ...
'''
"""How a ``model.py`` of version 0.1 begins."""


def exported(repository: Path, suffix: str = "", **releases: str) -> None:
    """The artifact folder of each named step, as the export of that id leaves it."""
    for step, release in releases.items():
        folder = repository / (step + suffix) / "1" / "artifact"
        with new_artifact(folder, KIND, options={}, inputs={}, facts={"release": release}) as partial:
            (partial / "file").write_text("content")


def arguments(repository: Path, model: str, config: str = "{}") -> dict[str, str]:
    """What Triton hands to ``initialize``, as seen with the wheel's server."""
    return {"model_name": model, "model_repository": str(repository / model), "model_config": config}


def test_a_releases_files_stand_in_the_models_version_folder():
    """Triton's layout of a repository: ``<model>/<version>``; a release's models carry its name behind theirs."""
    assert step_artifact(Path("/models"), "ranker") == Path("/models/ranker/1/artifact")
    assert step_artifact(Path("/models"), "ranker", "_r1") == Path("/models/ranker_r1/1/artifact")


# --- exports


@pytest.mark.parametrize("suffix", ["", "_r1"])
def test_a_complete_export_has_one_id(tmp_path, suffix):
    """The id that the export recorded in all four manifests; another release in the repository does not matter."""
    exported(tmp_path, suffix, **dict.fromkeys(STEPS, "0123abcd"))
    exported(tmp_path, "_other", features="ffff")
    assert exported_release(tmp_path, suffix) == "0123abcd"
    assert export_id(step_artifact(tmp_path, "features", "_other")) == "ffff"


@pytest.mark.parametrize("step", STEPS)
def test_a_step_of_another_export_makes_none(tmp_path, step):
    """Cut short after the first steps, or in between: old and new files would answer together."""
    exported(tmp_path, **{**dict.fromkeys(STEPS, "new"), step: "old"})
    with pytest.raises(InputError, match=r"different exports.*`llamarec export`"):
        exported_release(tmp_path)


def test_a_step_that_is_missing_is_named_with_the_command(tmp_path):
    """Nothing exported, or only a part of it."""
    with pytest.raises(InputError, match=r"features.*`llamarec export`"):
        exported_release(tmp_path)
    exported(tmp_path, features="r", retriever="r", prompt_builder="r")
    with pytest.raises(InputError, match=r"ranker.*`llamarec export`"):
        exported_release(tmp_path)


def test_an_artifact_of_another_kind_is_no_step(tmp_path):
    """The training artifact copied there by hand: it has a manifest, but not that of an export."""
    with new_artifact(step_artifact(tmp_path, "ranker"), "ranker", options={}, inputs={}) as folder:
        (folder / "file").write_text("content")
    with pytest.raises(InputError, match="llamarec export"):
        export_id(step_artifact(tmp_path, "ranker"))


# --- inside the server


def test_a_releases_step_looks_at_its_own_release_only(tmp_path):
    """Two releases side by side are of different exports by design; half of one is refused all the same."""
    exported(tmp_path, "_r1", **dict.fromkeys(STEPS, "one"))
    exported(tmp_path, "_r2", features="two", retriever="one")
    folder = loaded_artifact("features", arguments(tmp_path, "features_r1"))
    assert folder == tmp_path / "features_r1" / "1" / "artifact"
    with pytest.raises(InputError, match="features and retriever"):
        loaded_artifact("features", arguments(tmp_path, "features_r2"))


def test_parameters_are_read_from_tritons_configuration(tmp_path):
    """Triton hands the configuration over as JSON, with each parameter as an object of its own."""
    config = '{"name": "ranker", "parameters": {"QUEUE_SECONDS": {"string_value": "16"}}}'
    assert parameter(arguments(tmp_path, "ranker", config), "QUEUE_SECONDS") == "16"
    assert parameter(arguments(tmp_path, "ranker", config), "QUEUE_SIZE") is None
    assert parameter(arguments(tmp_path, "ranker"), "QUEUE_SECONDS") is None


def test_users_reach_the_log_in_repositories_of_this_version(tmp_path):
    """The committed configuration hands USER on; one without it is of an earlier version. Both have USER_ID."""
    assert passes_users(REPOSITORY)
    folder = tmp_path / "features_r1"
    shutil.copytree(REPOSITORY / "features", folder, ignore=shutil.ignore_patterns("artifact*"))
    assert passes_users(tmp_path, "_r1")
    config = text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())
    kept = [tensor for tensor in config.output if tensor.name != "USER"]
    del config.output[:]
    config.output.extend(kept)
    (folder / "config.pbtxt").write_text(text_format.MessageToString(config))
    assert not passes_users(tmp_path, "_r1")


# --- adapters of an earlier version


@pytest.fixture
def repository(tmp_path) -> Path:
    """The committed models, and the same once more as a release."""
    for step in STEPS:
        for suffix in ("", "_r1"):
            shutil.copytree(REPOSITORY / step, tmp_path / (step + suffix), ignore=shutil.ignore_patterns("artifact*"))
    return tmp_path


def test_the_committed_adapters_are_those_of_this_version():
    check_adapters(REPOSITORY)


@pytest.mark.parametrize("step", STEPS)
def test_an_adapter_of_an_earlier_version_is_refused_with_its_remedy(repository, step):
    """Its import would fail inside the server only, as a traceback: the sentence names file and command instead."""
    adapter = repository / step / "1" / "model.py"
    adapter.write_text(OLD_ADAPTER)
    with pytest.raises(InputError) as refused:
        check_adapters(repository)
    assert str(adapter) in str(refused.value)
    assert f"`llamarec export --repository {repository}`" in str(refused.value)


def test_an_adapter_of_an_old_release_is_refused_with_its_remedy(repository):
    """A release never changes, so it has to be built anew; only the releases that are to be loaded are looked at."""
    adapter = repository / "ranker_r1" / "1" / "model.py"
    adapter.write_text(OLD_ADAPTER)
    check_adapters(repository)
    check_adapters(repository, [])
    with pytest.raises(InputError) as refused:
        check_adapters(repository, ["", "_r1"])
    assert str(adapter) in str(refused.value)
    assert "`llamarec release build`" in str(refused.value)


def test_steps_that_are_not_there_are_no_reason_to_refuse(tmp_path):
    """What is missing is the server's to name: a repository may serve the retrieval alone, or nothing yet."""
    check_adapters(tmp_path)
    (tmp_path / "features" / "1").mkdir(parents=True)
    (tmp_path / "features" / "1" / "model.py").write_bytes(b"\xff no text, but an adapter of somebody's own")
    check_adapters(tmp_path)
