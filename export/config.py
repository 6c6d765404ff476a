"""The ``config.pbtxt`` of every model in the repository, generated from the serving contract.

The files are committed, so that the repository can be read and served as it stands; ``python -m export.config``
writes them again after a change to ``client/contract.py``.
"""

from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from client.contract import (
    ENSEMBLE,
    REQUEST,
    RESPONSE,
    RETRIEVAL_ENSEMBLE,
    STEP_SPECS,
    STEPS,
    ModelSpec,
    TensorSpec,
)

REPOSITORY = Path(__file__).resolve().parent.parent / "model_repository"
CONFIG = "config.pbtxt"
MAX_BATCH_SIZE = 64
ENSEMBLE_STEPS = {ENSEMBLE: STEPS, RETRIEVAL_ENSEMBLE: STEPS[:2]}
HEADER = "# Generated from client/contract.py by `python -m export.config`: change it there.\n"


def _tensors(specs: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
    return [{"name": spec.name, "data_type": f"TYPE_{spec.data_type}", "dims": spec.shape} for spec in specs]


def _inputs(specs: tuple[TensorSpec, ...], *, ragged: bool) -> list[dict[str, Any]]:
    """Inputs; with ``ragged``, requests whose variable lengths differ may still share a batch."""
    return [
        {**tensor, "optional": spec.optional, "allow_ragged_batch": ragged and -1 in spec.shape}
        for spec, tensor in zip(specs, _tensors(specs), strict=True)
    ]


def step_config(name: str, spec: ModelSpec) -> ModelConfig:
    """One Python model. Requests that queue while it works are handed to it together; none waits for company."""
    return ModelConfig(
        name=name,
        backend="python",
        max_batch_size=MAX_BATCH_SIZE,
        input=_inputs(spec.inputs, ragged=True),
        output=_tensors(spec.outputs),
        instance_group=[{"kind": "KIND_CPU", "count": 1}],
        dynamic_batching={},
    )


def ensemble_config(name: str, steps: tuple[str, ...]) -> ModelConfig:
    """The steps in a row: each tensor keeps its name, and a step's output that no later step takes stays inside it."""
    scheduled = []
    for place, step in enumerate(steps):
        wanted = {spec.name for later in steps[place + 1 :] for spec in STEP_SPECS[later].inputs}
        if step == steps[-1]:
            wanted = {spec.name for spec in RESPONSE}
        scheduled.append(
            {
                "model_name": step,
                "model_version": -1,
                "input_map": {spec.name: spec.name for spec in STEP_SPECS[step].inputs},
                "output_map": {spec.name: spec.name for spec in STEP_SPECS[step].outputs if spec.name in wanted},
            }
        )
    return ModelConfig(
        name=name,
        platform="ensemble",
        max_batch_size=MAX_BATCH_SIZE,
        input=_inputs(REQUEST, ragged=False),
        output=_tensors(RESPONSE),
        ensemble_scheduling={"step": scheduled},
    )


def model_configs() -> dict[str, ModelConfig]:
    """The configuration of every model of the repository, by name."""
    configs = {name: step_config(name, spec) for name, spec in STEP_SPECS.items()}
    return configs | {name: ensemble_config(name, steps) for name, steps in ENSEMBLE_STEPS.items()}


def write_configs(repository: Path) -> None:
    """Writes ``<model>/config.pbtxt`` for every model, and the version folder that Triton wants even of an ensemble."""
    for name, config in model_configs().items():
        folder = repository / name
        (folder / "1").mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(HEADER + text_format.MessageToString(config), encoding="utf-8")


if __name__ == "__main__":
    write_configs(REPOSITORY)
