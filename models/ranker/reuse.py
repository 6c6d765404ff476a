"""Takes a trained ranker over for a longer data set, without training it again.

A language model reads titles and not item numbers, so a tuned one also ranks the candidates of another retriever. What
depends on the retriever is the weight of its scores, which is fitted again.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from models.metrics import summary
from models.ranker.examples.sampling import Example
from models.ranker.examples.sets import validation_examples, validation_table
from models.ranker.fitting.curves import CURVES_FILE
from models.ranker.fitting.fusion_fit import expected_gain, fit_served
from models.ranker.fusion import fused_ranks, log_softmax
from models.ranker.inference.ranker import FUSION_FILE, MODEL_FOLDER, Ranker
from models.ranker.inference.scorer import Runtime
from models.ranker.prompt import SETTINGS_FILE, TOKENIZER_FILE, PromptBuilder
from models.ranker.training import KIND, METRICS_FILE
from preprocessing.artifacts import MANIFEST, is_finished, link_weights, new_artifact, read_manifest
from preprocessing.catalogue import ITEMS_FILE
from preprocessing.data import load_data
from preprocessing.progress import track

REUSED = "reused"
"""Name of the earlier ranker among the inputs of the manifest."""
ENOUGH_USERS = 50
"""Minimum number of validation users for a fit of the weight; with fewer, the earlier ranker's weight is kept."""


def reuse_ranker(earlier: Path, artifacts: Path, runtime: Runtime, *, candidates: int, users: int) -> dict[str, Any]:
    """Write ``artifacts/ranker`` from the ranker of earlier artifacts, and return what was fitted.

    The merged model, the adapter and the probes are copied, weights by hard links where that is possible. The
    retriever's weight and the temperature are fitted again, on validation users of ``artifacts`` whose true item is
    among the new retriever's candidates, unless there are too few. A folder made from the same artifacts is left as it
    is.

    Args:
        earlier: artifacts whose ``ranker`` is taken over.
        artifacts: folder that holds ``data`` and ``retriever``.
        runtime: how the ranker runs on this machine.
        candidates: number of candidates that the retriever hands on.
        users: maximum number of users on whom the weight is fitted; each takes a pass of the ranker.

    Returns:
        the content of the new ``metrics.json``: ``weight``, ``temperature``, ``weight_before``, ``fitted`` (whether
        they were fitted again) and ``validation``, the metrics of retriever and fused list.

    Raises:
        InputError: an artifact is missing, or the ranker was trained on prompts that this version does not build.
    """
    manifest = read_manifest(earlier / "ranker", KIND, "llamarec train-ranker")
    inputs = {
        **manifest.inputs,
        "data": read_manifest(artifacts / "data", "data", "llamarec preprocess").fingerprint,
        "retriever": read_manifest(artifacts / "retriever", "retriever", "llamarec train-retriever").fingerprint,
        REUSED: manifest.fingerprint,
    }
    folder = artifacts / "ranker"
    if is_finished(folder, KIND, options=manifest.options, inputs=inputs):
        metrics: dict[str, Any] = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
        return metrics
    with new_artifact(folder, KIND, options=manifest.options, inputs=inputs, facts=dict(manifest.facts)) as new:
        left = shutil.ignore_patterns(MANIFEST, FUSION_FILE, METRICS_FILE, CURVES_FILE)
        shutil.copytree(earlier / "ranker", new, ignore=left, dirs_exist_ok=True, copy_function=link_weights)
        fusion = json.loads((earlier / "ranker" / FUSION_FILE).read_text(encoding="utf-8"))
        examples = _examples(artifacts, candidates, users)
        metrics = {"weight_before": fusion["weight"], **_fit(earlier, artifacts, runtime, examples, fusion)}
        fusion.update({name: metrics[name] for name in ("weight", "temperature")})
        for name, content in ((FUSION_FILE, fusion), (METRICS_FILE, metrics)):
            (new / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return metrics


def _examples(artifacts: Path, candidates: int, users: int) -> list[Example]:
    """Return the prompts of at most so many validation users, chosen at random."""
    data = load_data(artifacts)
    found = validation_examples(validation_table(artifacts, data, candidates), data)
    return [found[place] for place in np.random.default_rng(0).permutation(len(found))[:users]]


def _fit(
    earlier: Path, artifacts: Path, runtime: Runtime, examples: Sequence[Example], fusion: dict[str, Any]
) -> dict[str, Any]:
    """Return weight, temperature and metrics, as :func:`reuse_ranker` returns them."""
    kept = {"weight": fusion["weight"], "temperature": fusion.get("temperature", 1.0), "fitted": False}
    if len(examples) < ENOUGH_USERS:
        return {**kept, "validation": {"users": len(examples)}}
    ranker, prompts = Ranker.load(earlier / "ranker", runtime), _prompts(earlier, artifacts)
    scored = [
        log_softmax(ranker.logits(prompts.build(example.history, example.candidates)))
        for example in track(examples, "fitting the retriever's weight", len(examples))
    ]
    truths, scores = [example.truth for example in examples], [example.scores for example in examples]
    weight, temperature = fit_served(scored, scores, truths, expected_gain(scored, scores, truths))
    return {
        "weight": weight,
        "temperature": temperature,
        "fitted": True,
        "validation": {
            "users": len(examples),
            "retriever": summary(np.asarray(truths) + 1),
            "fused": summary(fused_ranks(scored, scores, truths, weight)),
        },
    }


def _prompts(earlier: Path, artifacts: Path) -> PromptBuilder:
    """Return the builder of the earlier ranker's prompts, over the titles of the longer data set."""
    with TemporaryDirectory() as scratch:  # the builder reads one folder, as the export writes it
        folder = Path(scratch)
        shutil.copy(artifacts / "data" / ITEMS_FILE, folder)
        shutil.copy(earlier / "ranker" / SETTINGS_FILE, folder)
        shutil.copy(earlier / "ranker" / MODEL_FOLDER / TOKENIZER_FILE, folder)
        return PromptBuilder.load(folder)
