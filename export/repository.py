"""Fills the Triton model repository with the files that each step needs, next to its committed ``model.py``."""

import hashlib
import json
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.config import CONFIG, DEFAULTS, Serving, config_text, model_configs, write_configs
from export.onnx_graph import export_retriever
from export.text_arm import export_text_arms, reads_titles
from llamarec_client.contract import MAX_CANDIDATES
from models.ranker.inference.ranker import (
    EXPORTED_FILES,
    MODEL_FOLDER,
    Ranker,
    check_prefix_cache,
    read_probes,
    write_runtime,
)
from models.ranker.inference.runtimes import choose_runtime, suited_runtime
from models.ranker.inference.scorer import Runtime
from models.ranker.prompt import MOST_CANDIDATES, SETTINGS_FILE, TOKENIZER_FILE, Prompt, PromptBuilder
from models.retriever.inference.index import import_faiss
from models.retriever.inference.onnx_retriever import MODEL
from models.retriever.trained import TrainedRetriever
from preprocessing.artifacts import (
    Manifest,
    is_finished,
    link_weights,
    new_artifact,
    read_manifest,
    write_whole,
)
from preprocessing.catalogue import ITEMS_FILE, Catalogue
from preprocessing.errors import InputError
from preprocessing.features import save_vocabulary
from serving.contract import RELEASE_STEPS, RETRIEVER_SCORES, STORE_MODELS
from serving.layout import KIND, step_artifact
from serving.policy import NO_POLICY, Policy, check_groups, save_policy

PASS_FILE = "pass.json"
"""File in the ranker's exported folder with the duration of one pass on the exporting machine."""
MEASURED_PASSES = 5
PACKED_TOGETHER = 16
"""Number of prompts whose ranking together is measured, if they share passes."""
COMMITTED_REPOSITORY = Path(__file__).resolve().parents[1] / "model_repository"


@dataclass(frozen=True, kw_only=True)
class Export:
    """How the artifacts are served; offline evaluation runs the exported files in the same way."""

    backend: str | None = None
    """Runtime of the ranker, ``torch`` or ``openvino``. Default: OpenVINO if it is installed, bf16 is native and its
    graph computes the model."""
    dtype: str | None = None
    """Precision of the ranker's layers: ``float32``, ``bfloat16``, or on a GPU ``float16`` or ``float8``. Default:
    ``float16`` on a GPU, ``bfloat16`` on a processor that supports it."""
    threads: int | None = None
    """Number of threads of a ranking pass. Default: all that the machine has. It is part of the export because it
    determines the order of sums, and so the last bits of a score."""
    forward: str | None = None
    """Layers that PyTorch computes with: ``packed`` or ``transformers``. Default: the packed forward on a GPU if it
    computes the model, see :mod:`models.ranker.forward`."""
    batching: str = "exact"
    """Whether prompts that share a pass of the packed forward may change each other's scores by rounding: ``exact``
    (not by a bit) or ``tolerant``."""
    device: str = "auto"
    """Device of the ranker: ``auto`` (a GPU if there is one), ``cpu``, ``gpu`` (all of them) or ``gpu:N``."""
    index: bool = False
    """Whether the retriever searches the items approximately, with faiss."""
    retrieve: int | None = None
    """Number of candidates that the retriever hands to the ranker. Default: 20, or the ranker's maximum if it is lower.
    A ranking pass takes time in proportion to it."""
    policy: Policy = NO_POLICY
    """What requests without a policy of their own get: limits of groups, boosts, repeats."""
    serving: Serving = DEFAULTS
    """How Triton schedules the steps; the export fills in the ranker's device and the duration of its pass."""

    def runtime(self) -> Runtime:
        """Return the ranker's runtime; options that are not set are chosen for this machine.

        Raises:
            InputError: this machine has no such device, or OpenVINO is to run on a GPU or in PyTorch's layers.
        """
        device = "cpu" if self.device == "auto" and self.backend == "openvino" else self.device
        chosen = asdict(choose_runtime(device))
        if self.backend == "openvino" and chosen["device"] != "cpu":
            raise InputError("OpenVINO runs the ranker on the processor: use --device cpu, or --runtime torch on a GPU")
        if self.backend == "openvino" and self.forward:
            raise InputError(f"--forward {self.forward} is for PyTorch: use --runtime torch, or leave it out")
        backend = "torch" if self.forward and not self.backend else self.backend
        given = {"runtime": backend, "dtype": self.dtype, "threads": self.threads, "forward": self.forward}
        given["batching"] = self.batching
        return Runtime(**{**chosen, **{name: value for name, value in given.items() if value is not None}})

    def placement(self, runtime: Runtime) -> str:
        """Return where Triton places the ranker's instances: ``cpu``, ``gpu`` (on each of them) or ``gpu:N``."""
        if runtime.device == "cpu":
            return "cpu"
        return self.device.replace("cuda", "gpu") if ":" in self.device else "gpu"


def export(options: Export, artifacts: Path, repository: Path = COMMITTED_REPOSITORY, *, suffix: str = "") -> str:
    """Write every step's files into ``repository``, which ``tritonserver --model-repository`` can then serve.

    Each step's folder is written under a temporary name and renamed. All of them carry the same export id, and a step
    refuses to load if another step's id differs, so that a partial export is never served.

    The committed repository keeps its committed configurations as long as the serving options are the defaults. Any
    other repository gets configurations whose queue size follows from the measured duration of a ranking pass.

    Args:
        options: how the artifacts are served.
        artifacts: the data set's artifacts.
        repository: the model repository.
        suffix: appended to the name of every model, see :mod:`export.release`.

    Returns:
        the export id: a hash of the artifacts and of the options.

    Raises:
        InputError: an artifact is missing, the artifacts do not belong together, faiss is needed but not installed,
            OpenVINO is asked for and cannot run the model, the ranker orders fewer candidates than are to be retrieved,
            the items do not have the groups of the policy, or the cache of prefixes would not hold one.
    """
    manifests = check_artifacts(artifacts)
    check_groups(options.policy.given(), Catalogue.load(artifacts / "data" / ITEMS_FILE).groups, "the policy")
    limits = candidates_of(options, artifacts)
    if options.index:
        import_faiss()
    runtime = suited_runtime(options.runtime(), artifacts / "ranker" / MODEL_FOLDER, chosen=options.backend is not None)
    inputs = {kind: manifest.fingerprint for kind, manifest in manifests.items()}
    recorded: dict[str, Any] = {"runtime": asdict(runtime), "index": options.index}
    if limits.retrieved != MAX_CANDIDATES:  # recorded only then: exports of earlier versions keep their ids
        recorded["retrieve"] = limits.retrieved
    if policy := options.policy.given():
        recorded["policy"] = policy
    release = hashlib.sha256(json.dumps([inputs, recorded], sort_keys=True).encode()).hexdigest()[:16]
    facts: dict[str, Any] = {"release": release, "dataset": manifests["data"].facts["dataset"]}
    for step, fill in _fillers(artifacts, runtime, options, limits).items():
        folder = step_artifact(repository, step, suffix)
        if not is_finished(folder, KIND, options=recorded, inputs=inputs):
            with new_artifact(folder, KIND, options=recorded, inputs=inputs, facts=facts) as partial:
                fill(partial)
    _write_models(repository, replace(options.serving, device=options.placement(runtime)), suffix)
    return release


class Candidates(NamedTuple):
    """Numbers of candidates."""

    retrieved: int
    ranked: int
    """Maximum number that the ranker orders."""


def candidates_of(options: Export, artifacts: Path) -> Candidates:
    """Return how many candidates are retrieved, and how many the ranker orders at most.

    Raises:
        InputError: more are to be retrieved.
    """
    settings = artifacts / "ranker" / SETTINGS_FILE
    most = int(json.loads(settings.read_text(encoding="utf-8")).get("candidates", MAX_CANDIDATES))
    retrieved = min(MAX_CANDIDATES, most) if options.retrieve is None else options.retrieve
    if not 1 <= retrieved <= most:
        raise InputError(
            f"retrieve is {retrieved}, but this ranker orders 1 to {most} candidates: give --retrieve in that range, or"
            f" train with --read independent-lines, which allows {MOST_CANDIDATES}"
        )
    return Candidates(retrieved, most)


def check_artifacts(artifacts: Path) -> dict[str, Manifest]:
    """Return the manifests of data, retriever and ranker.

    Raises:
        InputError: an artifact is missing, or was made from others than these.
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


def _fillers(
    artifacts: Path, runtime: Runtime, options: Export, limits: Candidates
) -> dict[str, Callable[[Path], None]]:
    data, ranker = artifacts / "data", artifacts / "ranker"

    def features(folder: Path) -> None:
        shutil.copy(data / ITEMS_FILE, folder)
        trained = TrainedRetriever.load(artifacts / "retriever")
        titles = reads_titles(artifacts / "retriever", trained)
        save_vocabulary(folder, trained.models[0].items, limits.ranked, titles=titles)
        if options.policy.given():
            save_policy(folder, options.policy)

    def retriever(folder: Path) -> None:
        shutil.copy(data / ITEMS_FILE, folder)
        trained = TrainedRetriever.load(artifacts / "retriever")
        export_retriever(trained, folder, index=options.index, candidates=limits.retrieved)
        export_text_arms(artifacts / "retriever", trained, folder)

    def prompt_builder(folder: Path) -> None:
        shutil.copy(data / ITEMS_FILE, folder)
        shutil.copy(ranker / SETTINGS_FILE, folder)
        shutil.copy(ranker / MODEL_FOLDER / TOKENIZER_FILE, folder)
        PromptBuilder.load(folder).save_titles(folder)

    def rank(folder: Path) -> None:
        shutil.copytree(ranker / MODEL_FOLDER, folder / MODEL_FOLDER, copy_function=link_weights)
        for name in EXPORTED_FILES:
            if not (ranker / name).is_file():
                raise InputError(
                    f"{ranker / name} is missing: an older version trained the ranker; run `llamarec train-ranker`"
                )
            shutil.copy(ranker / name, folder)
        write_runtime(folder, runtime)
        (folder / PASS_FILE).write_text(json.dumps(measure_pass(folder, limits.retrieved)) + "\n", encoding="utf-8")

    return {"features": features, "retriever": retriever, "prompt_builder": prompt_builder, "ranker": rank}


def measure_pass(folder: Path, candidates: int = MAX_CANDIDATES) -> dict[str, float]:
    """Return the cost of ranking the exported ranker's probe prompts, of which the queue and the cache are made.

    Args:
        folder: the exported ranker's folder.
        candidates: number of candidates of a prompt with independent lines; others keep theirs.

    Returns:
        ``seconds``, the median duration of a pass, or of a prompt among others if they share passes, and
        ``prefix_bytes``, see :meth:`Ranker.prefix_bytes`.

    Raises:
        InputError: the ranker does not reproduce the scores that were stored with the probes.
    """
    ranker = Ranker.load(folder)
    prompts = [probe.prompt for probe in read_probes(folder)]
    filled = cycle([_filled(prompt, candidates) for prompt in prompts])
    together = PACKED_TOGETHER if ranker.packs else 1
    seconds = []
    for _ in range(MEASURED_PASSES):
        given = [(prompt, *_unordered(prompt)) for prompt in islice(filled, together)]
        started = time.perf_counter()
        ranker.rank_all(given)
        seconds.append((time.perf_counter() - started) / together)
    return {"seconds": statistics.median(seconds), "prefix_bytes": ranker.prefix_bytes(prompts)}


def _unordered(prompt: Prompt) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Return equal scores and ascending ranks for a prompt's candidates."""
    count = len(prompt.line_ends)
    return np.zeros(count, np.float32), np.arange(1, count + 1, dtype=np.int32)


def _filled(prompt: Prompt, candidates: int) -> Prompt:
    """Return a prompt whose independent lines are repeated until there are this many; any other prompt as it is."""
    if not prompt.prefix:
        return prompt
    return Prompt.of_lines(prompt.tokens[: prompt.prefix], islice(cycle(prompt.lines()), candidates))


def _write_models(repository: Path, serving: Serving, suffix: str) -> None:
    """Write configurations, unless the committed ones apply, and ``model.py`` files into any other repository."""
    committed = repository.resolve() == COMMITTED_REPOSITORY
    if committed and serving == DEFAULTS:
        return
    measured = json.loads((step_artifact(repository, "ranker", suffix) / PASS_FILE).read_text(encoding="utf-8"))
    if serving.prefix_cache:
        check_prefix_cache(serving.prefix_cache, measured.get("prefix_bytes", 0))
    write_configs(repository, replace(serving, pass_seconds=measured["seconds"]), suffix)
    for step in () if committed else RELEASE_STEPS:
        shutil.copy(COMMITTED_REPOSITORY / step / "1" / "model.py", repository / (step + suffix) / "1")
    if not committed and not suffix:
        write_store_models(repository, serving)
    if serving.retriever_runtime == "onnxruntime":
        graph, served = step_artifact(repository, "retriever", suffix) / MODEL, repository / (RETRIEVER_SCORES + suffix)
        shutil.copy(graph, served / "1" / "model.onnx")
        shutil.copy(graph.with_name(f"{MODEL}.data"), served / "1")  # the name by which the graph refers to its weights


def write_store_models(repository: Path, serving: Serving) -> None:
    """Write the models that record events and change items into a repository, unless they are there already.

    A running server would take a new time stamp for a new version.
    """
    configs = model_configs(serving)
    files = {}
    for name in STORE_MODELS:
        program = Path(name) / "1" / "model.py"
        files[repository / name / CONFIG] = config_text(configs[name])
        files[repository / program] = (COMMITTED_REPOSITORY / program).read_text(encoding="utf-8")
    for path, text in files.items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_whole(path, text)
