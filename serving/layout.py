"""Where the files of an exported step are in a model repository, and whether they belong together."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from preprocessing.artifacts import read_manifest
from preprocessing.errors import InputError
from serving.contract import FILES_OF, STEPS, STORE_PARAMETER, STORE_VARIABLE, USER

KIND = "step"
"""Kind of an exported step's manifest."""
REMEDY = "llamarec export"
OUTDATED_IMPORT = "export.steps"
"""Module that the ``model.py`` of repositories exported by version 0.1 imports."""


def step_artifact(repository: Path, step: str, suffix: str = "") -> Path:
    """Return the folder of the exported files that a step reads; ``suffix`` is that of a release."""
    return repository / (FILES_OF.get(step, step) + suffix) / "1" / "artifact"


def export_id(folder: Path) -> str:
    """Return the id of the export that made a step's folder: a hash of the artifacts and of the options.

    Raises:
        InputError: the folder is missing, or is not what the export wrote.
    """
    return str(read_manifest(folder, KIND, REMEDY).facts["release"])


def exported_dataset(folder: Path) -> str:
    """Return the name of the data set whose models a step's folder was exported from.

    Raises:
        InputError: the folder is missing, or is not what the export wrote.
    """
    return str(read_manifest(folder, KIND, REMEDY).facts["dataset"])


def known_export_id(folder: Path) -> str | None:
    """Return the id that :func:`export_id` returns; None if the folder is missing or is not what the export wrote."""
    try:
        return export_id(folder)
    except InputError:
        return None


def exported_release(repository: Path, suffix: str = "") -> str:
    """Return the export id of a completely exported repository.

    Raises:
        InputError: a step has no files, or the steps' files are of different exports.
    """
    exports = {export_id(step_artifact(repository, step, suffix)) for step in STEPS}
    if len(exports) != 1:
        raise InputError(f"the steps in {repository} are of different exports: run `{REMEDY}` again")
    return exports.pop()


def loaded_artifact(step: str, arguments: Mapping[str, str]) -> Path:
    """Return the exported files of a step, from the arguments of Triton's ``initialize``.

    The model's name is the step's, with a suffix where several releases share one repository.

    Raises:
        InputError: nothing is exported, or another step's files are from another export.
    """
    suffix = arguments["model_name"].removeprefix(step)
    repository = Path(arguments["model_repository"]).parent
    folder = step_artifact(repository, step, suffix)
    own = export_id(folder)
    for other in STEPS:
        sibling = step_artifact(repository, other, suffix)
        if other != step and sibling.exists() and export_id(sibling) != own:
            raise InputError(f"{step} and {other} are from different exports: half exported, run `{REMEDY}`")
    return folder


def parameter(arguments: Mapping[str, str], name: str) -> str | None:
    """Return a parameter of the model's configuration, from the arguments of Triton's ``initialize``."""
    parameters = json.loads(arguments["model_config"]).get("parameters", {})
    value: str | None = parameters.get(name, {}).get("string_value")
    return value


def store_address(arguments: Mapping[str, str]) -> str | None:
    """Return the address of the store of histories; None if there is none.

    It is in the environment, or in the model's configuration.
    """
    return os.environ.get(STORE_VARIABLE) or parameter(arguments, STORE_PARAMETER)


def instance_device(arguments: Mapping[str, str]) -> str | None:
    """Return PyTorch's name of the GPU that Triton gave this instance; None for an instance on the processor."""
    if arguments.get("model_instance_kind") != "GPU":
        return None
    return f"cuda:{arguments['model_instance_device_id']}"


def passes_users(repository: Path, suffix: str = "") -> bool:
    """Return whether the users of requests reach the log of answers.

    In repositories that were exported before there was such a log, `features` does not hand them on.
    """
    config = repository / f"features{suffix}" / "config.pbtxt"
    return not config.is_file() or f'name: "{USER.name}"' in config.read_text(encoding="utf-8")


def check_adapters(repository: Path, suffixes: Iterable[str] = ("",)) -> None:
    """Refuse steps whose ``model.py`` an earlier version exported, which this version cannot run.

    Args:
        repository: the model repository.
        suffixes: of the releases to check; by default the models without a suffix.

    Raises:
        InputError: names the file and the command that exports it again.
    """
    for suffix in suffixes:
        for step in STEPS:
            adapter = repository / (step + suffix) / "1" / "model.py"
            if adapter.is_file() and OUTDATED_IMPORT in adapter.read_text(encoding="utf-8", errors="replace"):
                build = "llamarec release build" if suffix else f"{REMEDY} --repository {repository}"
                raise InputError(f"{adapter} was exported by an earlier version of llamarec: run `{build}` again")
