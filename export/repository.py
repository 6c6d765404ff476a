"""Fills the Triton model repository: what each step needs, beside the thin ``model.py`` that is committed there."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from client.contract import ENSEMBLE, RETRIEVAL_ENSEMBLE, STEPS
from export.config import write_configs
from models.ranker.prompt import SETTINGS_FILE, TOKENIZER_FILE
from models.ranker.scoring import Runtime, choose_runtime
from models.ranker.serving import EXPORTED_FILES, MODEL_FOLDER, write_runtime
from models.retriever import serving as retriever_serving
from models.retriever.onnx_export import export_onnx
from models.retriever.training import load_retriever
from preprocessing.artifacts import Manifest, is_finished, new_artifact, read_manifest
from preprocessing.catalogue import ITEMS_FILE
from preprocessing.errors import InputError

KIND = "step"
COMMITTED_REPOSITORY = Path(__file__).resolve().parents[1] / "model_repository"


@dataclass(frozen=True, kw_only=True)
class Export:
    """How the artifacts are served. Offline evaluation runs the exported files the same way."""

    backend: str | None = None
    """What runs the ranker, ``torch`` or ``openvino``; by default OpenVINO where it is installed and bf16 is native."""
    dtype: str | None = None
    """Precision of the ranker's layers, ``float32`` or ``bfloat16``; by default bf16 where the processor has it."""
    threads: int | None = None
    """Threads of one ranking pass; by default all that this machine has. Part of the export because the number of
    threads decides the order of sums, and so the last bits of a score."""
    device: str | None = None
    """``cpu`` or ``cuda``; by default a GPU where there is one."""

    def runtime(self) -> Runtime:
        """The ranker's runtime, with what was left open filled in for this machine."""
        chosen = asdict(choose_runtime(self.device))
        given = {"runtime": self.backend, "dtype": self.dtype, "threads": self.threads}
        return Runtime(**{**chosen, **{name: value for name, value in given.items() if value is not None}})


def step_artifact(repository: Path, step: str) -> Path:
    """Where the files of a step stand in a model repository."""
    return repository / step / "1" / "artifact"


def export(options: Export, artifacts: Path, repository: Path = COMMITTED_REPOSITORY) -> str:
    """Writes every step's files into ``repository``, which ``tritonserver --model-repository`` can then serve.

    Each step's folder is written aside and renamed. All of them carry the same release; a step that finds another
    release beside it refuses to load, so a repository whose export was cut short is not served.

    Returns:
        the release: a hash of the artifacts and of the options.

    Raises:
        InputError: a stage is missing, or the artifacts belong to different data sets.
    """
    manifests = check_artifacts(artifacts)
    runtime = options.runtime()
    inputs = {kind: manifest.fingerprint for kind, manifest in manifests.items()}
    recorded = {"runtime": asdict(runtime)}
    release = hashlib.sha256(json.dumps([inputs, recorded], sort_keys=True).encode()).hexdigest()[:16]
    _write_models(repository)
    facts: dict[str, Any] = {"release": release, "dataset": manifests["data"].facts["dataset"]}
    for step, fill in _fillers(artifacts, runtime).items():
        folder = step_artifact(repository, step)
        if not is_finished(folder, KIND, options=recorded, inputs=inputs):
            with new_artifact(folder, KIND, options=recorded, inputs=inputs, facts=facts) as partial:
                fill(partial)
    return release


def check_artifacts(artifacts: Path) -> dict[str, Manifest]:
    """The manifests of data, retriever and ranker.

    Raises:
        InputError: one is missing, or was made from another one than stands here.
    """
    manifests = {"data": read_manifest(artifacts / "data", "data", "llamarec preprocess")}
    for kind in ("retriever", "ranker"):
        manifest = read_manifest(artifacts / kind, kind, f"llamarec train-{kind}")
        for name, found in manifests.items():
            if manifest.inputs.get(name) != found.fingerprint:
                raise InputError(
                    f"{artifacts / kind} was made from other {name} than {artifacts / name}"
                    f" (data set {found.facts.get('dataset')}): run `llamarec train-{kind}` again"
                )
        manifests[kind] = manifest
    return manifests


def read_release(repository: Path) -> str:
    """The release of a completely exported repository.

    Raises:
        InputError: a step has no files, or the steps' files are of different releases.
    """
    releases = {
        read_manifest(step_artifact(repository, step), KIND, "llamarec export").facts["release"] for step in STEPS
    }
    if len(releases) != 1:
        raise InputError(f"the steps in {repository} are of different exports: run `llamarec export` again")
    return str(releases.pop())


def _fillers(artifacts: Path, runtime: Runtime) -> dict[str, Callable[[Path], None]]:
    data, ranker = artifacts / "data", artifacts / "ranker"

    def features(folder: Path) -> None:
        shutil.copy(data / ITEMS_FILE, folder)

    def retriever(folder: Path) -> None:
        shutil.copy(data / ITEMS_FILE, folder)
        model, options = load_retriever(artifacts / "retriever")
        export_onnx(model, options.max_length, folder / retriever_serving.MODEL)
        # One thread: a pass takes about a millisecond, and the ranker wants the cores.
        settings = {"length": options.max_length, "threads": 1}
        (folder / retriever_serving.SETTINGS).write_text(json.dumps(settings) + "\n", encoding="utf-8")

    def prompt_builder(folder: Path) -> None:
        shutil.copy(data / ITEMS_FILE, folder)
        shutil.copy(ranker / SETTINGS_FILE, folder)
        shutil.copy(ranker / MODEL_FOLDER / TOKENIZER_FILE, folder)

    def rank(folder: Path) -> None:
        shutil.copytree(ranker / MODEL_FOLDER, folder / MODEL_FOLDER)
        for name in EXPORTED_FILES:
            shutil.copy(ranker / name, folder)
        write_runtime(folder, runtime)

    return {"features": features, "retriever": retriever, "prompt_builder": prompt_builder, "ranker": rank}


def _write_models(repository: Path) -> None:
    """The committed ``model.py`` and ``config.pbtxt`` files, where the repository is another one than the project's."""
    if repository.resolve() == COMMITTED_REPOSITORY:
        return
    for step in STEPS:
        target = repository / step / "1"
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(COMMITTED_REPOSITORY / step / "1" / "model.py", target)
    for ensemble in (ENSEMBLE, RETRIEVAL_ENSEMBLE):
        (repository / ensemble / "1").mkdir(parents=True, exist_ok=True)
    write_configs(repository)
