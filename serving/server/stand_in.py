"""Has the requests that wait for a dead step refused at once, by a process that needs none of the step's files.

Triton takes no request out of a model's queue, and its Python backend waits a second for each request to a process that
died. But all instances of a model share its queue, and loading a configuration that differs in its instance groups only
adds instances to the running model. The instance that is added here refuses every request: the adapters of the steps
start it as :class:`serving.steps.worker.Worker` of a dead step. It ends when the step is loaded again.
"""

import importlib.util
import py_compile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from serving.contract import STAND_IN
from serving.server.process import Stub


def with_stand_in(config: dict[str, Any]) -> dict[str, Any]:
    """Return a model's configuration with one more instance, which refuses every request."""
    group = {"name": STAND_IN, "kind": "KIND_CPU", "count": 1}
    return {**config, "instance_group": [*without_stand_in(config).get("instance_group", []), group]}


def without_stand_in(config: dict[str, Any]) -> dict[str, Any]:
    """Return a model's configuration with the instances of the step alone."""
    groups = [group for group in config.get("instance_group", []) if group.get("name") != STAND_IN]
    return {**config, "instance_group": groups}


def of_model(stubs: Iterable[Stub], model: str) -> list[Stub]:
    """Return the processes that do a model's work, without one that stands in for them."""
    return [stub for stub in stubs if stub.model == model and not stub.instance.startswith(f"{STAND_IN}_")]


def compile_models(repository: Path) -> None:
    """Compile every ``model.py`` that is not compiled yet, before a server starts on the repository.

    Otherwise the first process of a step would do it. The folder's new time stamp looks like a new version to Triton,
    which then replaces the instances instead of adding one, also when it next loads an ensemble with the model.

    Raises:
        OSError: the repository cannot be written.
    """
    for path in sorted(repository.glob("*/1/model.py")):
        if not Path(importlib.util.cache_from_source(str(path))).exists():
            py_compile.compile(str(path), invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
