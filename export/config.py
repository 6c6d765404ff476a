"""The ``config.pbtxt`` of every model in the repository, generated from the serving contract and a few options.

The files of the default options are committed, so that the repository can be read and served as it stands;
``python -m export.config`` writes them again after a change to ``client/llamarec_client/contract.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from llamarec_client.contract import ENSEMBLE, REQUEST, RESPONSE, RETRIEVAL_ENSEMBLE, TensorSpec
from preprocessing.errors import InputError
from serving.contract import (
    CACHE_PARAMETER,
    QUEUE_PARAMETER,
    SCORES_PARAMETER,
    SIZE_PARAMETER,
    STEP_SPECS,
    STEPS,
    ModelSpec,
)

REPOSITORY = Path(__file__).resolve().parent.parent / "model_repository"
CONFIG = "config.pbtxt"
ENSEMBLE_STEPS = {ENSEMBLE: STEPS, RETRIEVAL_ENSEMBLE: STEPS[:2]}
HEADER = "# Generated from client/llamarec_client/contract.py by `python -m export.config`: change it there.\n"
RETRIEVER_SCORES = "retriever_scores"
"""With ``--retriever-runtime onnxruntime``: the retriever's graph as a model of its own, in Triton's ONNX backend."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How Triton schedules the steps. What is answered does not depend on any of it."""

    instances: int = 1
    """Processes of the ranker, each with its own copy of the model (on a GPU: on every GPU)."""
    max_batch_size: int = 64
    """Most requests that Triton hands to a step together."""
    queue_delay_us: int = 0
    """Microseconds that a request waits for company at the ranker; 0: takes along what queues, waits for nothing."""
    device: str = "cpu"
    """Where the ranker's instances are placed."""
    retriever_runtime: str = "python"
    """``onnxruntime``: the retriever's graph runs in Triton's own ONNX backend instead of its Python process."""
    pass_seconds: float = 2.0
    """What one ranking pass takes; the wait for the ranker is limited by it. `llamarec export` measures it."""
    queue_seconds: float | None = None
    """Longest that a request may wait for the ranker before it is refused; by default eight passes, at least 5 s."""
    rank_cache: int = 0
    """How many prompts' answers the ranker remembers. At the ranker only: its inputs determine its answer."""

    def __post_init__(self) -> None:
        for name in ("instances", "max_batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: give at least 1")
        if self.queue_delay_us < 0:
            raise InputError(f"queue_delay_us is {self.queue_delay_us}: give microseconds, 0 for none")
        if self.rank_cache < 0:
            raise InputError(f"rank_cache is {self.rank_cache}: give a number of prompts, 0 for none")
        for name in ("pass_seconds", "queue_seconds"):
            if (seconds := getattr(self, name)) is not None and not seconds > 0:
                raise InputError(f"{name} is {seconds:g}: give more than 0")
        if self.device not in ("cpu", "gpu"):
            raise InputError(f"there is no device {self.device!r}: choose cpu or gpu")
        if self.retriever_runtime not in ("python", "onnxruntime"):
            raise InputError(f"there is no retriever runtime {self.retriever_runtime!r}: choose python or onnxruntime")

    @property
    def queue_timeout(self) -> float:
        """Seconds: ``queue_seconds``, or what follows from the time of a pass."""
        return self.queue_seconds or max(8 * self.pass_seconds, 5.0)

    @property
    def queue_size(self) -> int:
        """Most prompts that may wait for the ranker: as many as are ranked in time, after those under way."""
        together = self.max_batch_size if self.batches else 1
        return max(int(self.queue_timeout / self.pass_seconds - 1) * self.instances * together, 1)

    @property
    def batches(self) -> bool:
        """Whether the ranker is handed several requests together.

        Not on a processor that is not told to wait for company: a pass gains nothing there, and what is handed over
        together is answered together, after the last one's pass.
        """
        return self.device == "gpu" or self.queue_delay_us > 0


DEFAULTS = Serving()


def _tensors(specs: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
    return [{"name": spec.name, "data_type": f"TYPE_{spec.data_type}", "dims": spec.shape} for spec in specs]


def _inputs(specs: tuple[TensorSpec, ...], *, ragged: bool) -> list[dict[str, Any]]:
    """Inputs; with ``ragged``, requests whose variable lengths differ may still share a batch."""
    return [
        {**tensor, "optional": spec.optional, "allow_ragged_batch": ragged and -1 in spec.shape}
        for spec, tensor in zip(specs, _tensors(specs), strict=True)
    ]


def step_config(name: str, spec: ModelSpec, serving: Serving = DEFAULTS) -> ModelConfig:
    """One Python model. Requests that queue while it works are handed to it together; by default none waits.

    No step has a queue policy: see :mod:`serving.steps.ranker_queue` for what limits the wait for the ranker, and why.
    """
    config: dict[str, Any] = {"instance_group": [{"kind": "KIND_CPU", "count": 1}], "dynamic_batching": {}}
    if name == "ranker":
        config["instance_group"] = [{"kind": f"KIND_{serving.device.upper()}", "count": serving.instances}]
        if not serving.batches:
            del config["dynamic_batching"]
        elif serving.queue_delay_us:
            config["dynamic_batching"] = {"max_queue_delay_microseconds": serving.queue_delay_us}
    step = ModelConfig(
        name=name,
        backend="python",
        max_batch_size=serving.max_batch_size,
        input=_inputs(spec.inputs, ragged=True),
        output=_tensors(spec.outputs),
        **config,
    )
    if name in ("prompt_builder", "ranker"):
        step.parameters[QUEUE_PARAMETER].string_value = f"{serving.queue_timeout:g}"
    if name == "prompt_builder":
        step.parameters[SIZE_PARAMETER].string_value = str(serving.queue_size)
    if name == "ranker" and serving.rank_cache:
        step.parameters[CACHE_PARAMETER].string_value = str(serving.rank_cache)
    if name == "retriever" and serving.retriever_runtime == "onnxruntime":
        step.parameters[SCORES_PARAMETER].string_value = RETRIEVER_SCORES
    return step


def scores_config(serving: Serving = DEFAULTS) -> ModelConfig:
    """The retriever's graph in the ONNX backend: one padded history at a time, so that no answer depends on another."""
    config = ModelConfig(
        name=RETRIEVER_SCORES,
        backend="onnxruntime",
        platform="onnxruntime_onnx",
        default_model_filename="model.onnx",
        max_batch_size=0,
        input=[{"name": "items", "data_type": "TYPE_INT64", "dims": [-1, -1]}],
        output=[{"name": "scores", "data_type": "TYPE_FP32", "dims": [-1, -1]}],
        instance_group=[{"kind": f"KIND_{serving.device.upper()}", "count": 1}],
    )
    for name in ("intra_op_thread_count", "inter_op_thread_count"):  # as in the Python process
        config.parameters[name].string_value = "1"
    return config


def ensemble_config(name: str, steps: tuple[str, ...], serving: Serving = DEFAULTS, suffix: str = "") -> ModelConfig:
    """The steps in a row: each tensor keeps its name, and a step's output that no later step takes stays inside it."""
    scheduled = []
    for place, step in enumerate(steps):
        wanted = {spec.name for later in steps[place + 1 :] for spec in STEP_SPECS[later].inputs}
        if step == steps[-1]:
            wanted = {spec.name for spec in RESPONSE}
        scheduled.append(
            {
                "model_name": step + suffix,
                "model_version": -1,
                "input_map": {spec.name: spec.name for spec in STEP_SPECS[step].inputs},
                "output_map": {spec.name: spec.name for spec in STEP_SPECS[step].outputs if spec.name in wanted},
            }
        )
    return ModelConfig(
        name=name,
        platform="ensemble",
        max_batch_size=serving.max_batch_size,
        input=_inputs(REQUEST, ragged=False),
        output=_tensors(RESPONSE),
        ensemble_scheduling={"step": scheduled},
    )


def model_configs(serving: Serving = DEFAULTS, suffix: str = "") -> dict[str, ModelConfig]:
    """The configuration of every model of the repository, by name.

    Args:
        serving: the options.
        suffix: behind the name of every model: releases stand beside each other in one repository.
    """
    configs = {name: step_config(name, spec, serving) for name, spec in STEP_SPECS.items()}
    if serving.retriever_runtime == "onnxruntime":
        configs[RETRIEVER_SCORES] = scores_config(serving)
        configs["retriever"].parameters[SCORES_PARAMETER].string_value += suffix
    configs |= {name: ensemble_config(name, steps, serving, suffix) for name, steps in ENSEMBLE_STEPS.items()}
    for config in configs.values():
        config.name += suffix
    return {config.name: config for config in configs.values()}


def config_text(config: ModelConfig) -> str:
    """The ``config.pbtxt`` of a model."""
    text: str = text_format.MessageToString(config)
    return HEADER + text


def write_configs(repository: Path, serving: Serving = DEFAULTS, suffix: str = "") -> Mapping[str, ModelConfig]:
    """Writes ``<model>/config.pbtxt`` for every model, and the version folder that Triton wants even of an ensemble."""
    configs = model_configs(serving, suffix)
    for name, config in configs.items():
        folder = repository / name
        (folder / "1").mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(config_text(config), encoding="utf-8")
    return configs


if __name__ == "__main__":
    write_configs(REPOSITORY)
