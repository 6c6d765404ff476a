"""The ranker's training stage: the second stage of LlamaRec (paper, section 3.2.2).

It reads the artifacts, tunes the base (:mod:`models.ranker.fitting.loop`), measures the result, and writes a merged
ranker that is ready to export.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from models.checkpoint import Checkpoint
from models.device import torch_device
from models.metrics import summary
from models.ranker.base import EMBEDDED, base_fingerprint, find_base
from models.ranker.examples.sampling import Example
from models.ranker.examples.sets import training_examples, validation_examples, validation_table
from models.ranker.fitting.curves import CURVES_FILE
from models.ranker.fitting.fusion_fit import expected_gain, fit_served
from models.ranker.fusion import fused_ranks, log_softmax, ndcg_by_weight
from models.ranker.inference.ranker import FUSION_FILE, MODEL_FOLDER, PROBES_FILE
from models.ranker.inference.verbalizer import VERBALIZER_FILE, Verbalizer
from models.ranker.options import RankerTraining
from models.ranker.prompt import RESPONSE, TOKENIZER_FILE, PromptBuilder, letter_ids
from preprocessing.artifacts import is_finished, new_artifact, read_manifest
from preprocessing.data import Data, load_data
from preprocessing.errors import InputError

if TYPE_CHECKING:  # torch, peft and bitsandbytes take seconds to import: not for a stage that is finished
    from models.ranker.fitting.loop import FittedRanker
    from models.ranker.fitting.validation import Logprobs
    from models.ranker.inference.torch_scorer import TorchScorer

KIND = "ranker"
TRAINING_FOLDER = "ranker-training"
"""Checkpoint and TensorBoard events of the latest training; the checkpoint is removed when the artifact is written."""
CHECKPOINT_FILE = "checkpoint.pt"
ADAPTER_FOLDER = "adapter"
METRICS_FILE = "metrics.json"
PROBES = 4
"""Number of validation prompts whose scores are stored, so that every runtime can be checked against them."""
MERGED_TOLERANCE = {"torch.float32": 0.1, "torch.bfloat16": 1.0}
"""Largest change of a prompt's log-probabilities (root mean square over the candidates) by merging, by the precision of
the training. Merged weights are stored in fp16, which changes them by 0.015; bf16 by 0.04 to 0.7."""


def train_ranker(options: RankerTraining, artifacts: Path, base: str = EMBEDDED) -> dict[str, Any]:
    """Tune the base on this data, fit the retriever's weight, and write ``artifacts/ranker``.

    The folder holds ``adapter/``, ``merged/`` (a Hugging Face folder in fp16), ``prompt.json``, ``verbalizer.json``,
    ``fusion.json``, ``probes.json``, ``metrics.json`` and ``curves.png``. A folder made from the same options and
    inputs is left as it is; an interrupted training resumes from its last checkpoint. Under ``accelerate launch`` all
    processes train together, each on a GPU of its own if they have any, and the first one writes.

    Args:
        options: see :class:`RankerTraining`.
        artifacts: folder that holds ``data`` and ``retriever``; converted bases are kept in its subfolder ``base``.
        base: see :func:`models.ranker.base.find_base`.

    Returns:
        the content of ``metrics.json``: validation metrics of the retriever, of the untuned and the tuned model alone
        and of the fused list, the retriever's weight, and the log of the training.

    Raises:
        InputError: data, retriever or base are missing or do not belong together, or an interrupted training in the
            same folder has other options or inputs.
    """
    from models.processes import device_of, processes_on

    options = replace(options, device=torch_device(options.device))
    processes = processes_on(options.device)
    with processes.main_process_first():  # which may have to convert the base
        base_folder, inputs = _check_inputs(artifacts, base)
    folder, made_with = artifacts / "ranker", {**asdict(options), "base": base}
    del made_with["checkpoint_minutes"]  # it changes nothing of the ranker
    if is_finished(folder, KIND, options=made_with, inputs=inputs):
        metrics: dict[str, Any] = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
        return metrics
    options = replace(options, device=device_of(options.device, processes))
    given = _read_inputs(options, artifacts, base_folder)
    model = _load_base(options, base_folder, given)
    examples = training_examples(options, artifacts, given.data)
    training = artifacts / TRAINING_FOLDER
    checkpoint = Checkpoint(training / CHECKPOINT_FILE, made_with, inputs)
    fitted = _fit(options, model, given, examples, checkpoint, training)
    metrics = _measure(options, given, fitted)
    if processes.is_main_process:
        facts = {"dataset": given.data.name, "prompts": len(examples)}
        facts["prompts_per_second"] = round(fitted.prompts_per_second, 3)
        with new_artifact(folder, KIND, options=made_with, inputs=inputs, facts=facts) as new:
            _write(new, base, base_folder, given, fitted, metrics)
            shutil.copyfile(training / CURVES_FILE, new / CURVES_FILE)
        checkpoint.remove()
    processes.wait_for_everyone()
    return metrics


def _check_inputs(artifacts: Path, base: str) -> tuple[Path, dict[str, str]]:
    """Return the base's folder and the fingerprint of everything that the training reads."""
    data = read_manifest(artifacts / "data", "data", "llamarec preprocess")
    retriever = read_manifest(artifacts / "retriever", "retriever", "llamarec train-retriever")
    if retriever.inputs.get("data") != data.fingerprint:
        raise InputError(
            f"{artifacts / 'retriever'} was trained on other data than {artifacts / 'data'}:"
            " run `llamarec train-retriever` again"
        )
    folder = find_base(base, artifacts / "base")
    inputs = {"data": data.fingerprint, "retriever": retriever.fingerprint, "base": base_fingerprint(folder)}
    return folder, inputs


@dataclass(frozen=True)
class _Inputs:
    """What a training reads apart from its options, the base's weights and the examples to train on."""

    data: Data
    tokenizer: Tokenizer
    """The base's."""
    prompts: PromptBuilder
    letter_ids: list[int]
    everyone: list[Example]
    """One validation example for each user whose validation item the retriever found, in random order."""
    sample: list[Example]
    """The first examples of ``everyone``, on which the model is validated during training."""


def _read_inputs(options: RankerTraining, artifacts: Path, base: Path) -> _Inputs:
    data = load_data(artifacts)
    try:
        tokenizer = Tokenizer.from_file(str(base / TOKENIZER_FILE))
    except Exception as error:  # the package raises no narrower class
        raise InputError(f"{base / TOKENIZER_FILE} is not a tokenizer ({error}): download the base again") from None
    prompts = PromptBuilder(data.catalogue, tokenizer, options.prompt_settings())
    letters = [] if options.independent else letter_ids(tokenizer, RESPONSE, options.candidates)
    found = validation_examples(validation_table(artifacts, data, options.candidates), data)
    everyone = [found[place] for place in np.random.default_rng(options.seed).permutation(len(found))]
    return _Inputs(data, tokenizer, prompts, letters, everyone, everyone[: options.validation_users])


def _load_base(options: RankerTraining, folder: Path, given: _Inputs) -> Any:
    """Return the base, after checks on prompts that share the instruction, and two of them the history too."""
    # On import, bitsandbytes logs a warning about an optional package.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from models.ranker.fitting.base_checks import load_checked

    history, candidates = given.everyone[0].history, given.everyone[0].candidates
    tried = ((history, candidates), (history, candidates[::-1]), (history[:1], candidates[:2]))
    prompts = [given.prompts.build(*one) for one in tried]
    return load_checked(options, folder, given.tokenizer, prompts, given.letter_ids)


def _fit(
    options: RankerTraining,
    model: Any,
    given: _Inputs,
    examples: Sequence[Example],
    checkpoint: Checkpoint,
    training: Path,
) -> "FittedRanker":
    from models.ranker.fitting import loop

    return loop.fit(options, model, given.prompts, given.letter_ids, examples, given.sample, checkpoint, training)


def _measure(options: RankerTraining, given: _Inputs, fitted: "FittedRanker") -> dict[str, Any]:
    """Return the content of ``metrics.json``; the weight is fitted on all validation examples, or on the sample."""
    from models.ranker.fitting.validation import ranks_alone, score_examples

    validated = given.everyone if options.full_validation else given.sample
    rest = validated[len(given.sample) :]
    scored = [*fitted.logprobs, *score_examples(fitted.model, fitted.objective, given.prompts, rest)]
    truths, scores = [example.truth for example in validated], [example.scores for example in validated]
    gain = expected_gain(scored, scores, truths)
    weight, temperature = fit_served(scored, scores, truths, gain)
    return {
        "validation": {
            "users": len(validated),
            "retriever": summary(np.asarray(truths) + 1),
            "alone": summary(ranks_alone(scored, validated)),
            "fused": summary(fused_ranks(scored, scores, truths, weight)),
        },
        "sample": {
            "users": len(given.sample),
            "untuned": summary(ranks_alone(fitted.untuned, given.sample)),
            "alone": summary(ranks_alone(fitted.logprobs, given.sample)),
        },
        "weight": weight,
        "temperature": temperature,
        "gain": None if gain is None else gain._asdict(),
        "NDCG@10_by_weight": {str(key): value for key, value in ndcg_by_weight(scored, scores, truths).items()},
        "best_step": fitted.best_step,
        "training": fitted.log,
    }


def _write(
    new: Path, base: str, base_folder: Path, given: _Inputs, fitted: "FittedRanker", metrics: dict[str, Any]
) -> None:
    """Write everything that the export needs, and the adapter, into the new artifact."""
    from models.ranker.fitting.merge import save_merged

    _save_adapter(fitted.model, base, new / ADAPTER_FOLDER)
    save_merged(fitted.model, base_folder, new / MODEL_FOLDER)
    given.prompts.save_settings(new)
    verbalizer = fitted.objective.verbalizer()
    device = str(fitted.model.device)
    replayed = probes(new / MODEL_FOLDER, given.prompts, verbalizer, given.sample[:PROBES], device)
    _check_merged([probe["logprobs"] for probe in replayed], fitted.logprobs, str(fitted.model.dtype))
    stored = {
        VERBALIZER_FILE: verbalizer.stored(),
        FUSION_FILE: {"weight": metrics["weight"], "temperature": metrics["temperature"]},
        PROBES_FILE: replayed,
        METRICS_FILE: metrics,
    }
    for name, content in stored.items():
        (new / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _check_merged(merged: Sequence[Sequence[float]], tuned: "Logprobs", dtype: str) -> None:
    """Check that the merged model gives the log-probabilities of the tuned one, within the precision of the training.

    The allowed change grows with the spread of a prompt's log-probabilities, as rounding does.

    Raises:
        InputError: it gives others.
    """
    for place, (found, expected) in enumerate(zip(merged, tuned, strict=False)):
        change = np.sqrt(np.mean((np.asarray(found) - expected) ** 2))
        allowed = MERGED_TOLERANCE[dtype] * max(1.0, float(np.std(expected)))
        if not change <= allowed:
            raise InputError(
                f"the merged model is not the tuned one: the log-probabilities of probe prompt {place} moved by"
                f" {change:.3g}, more than the {allowed:.3g} that rounding explains, so nothing was written: choose a"
                " base such as Llama 2"
            )


def probes(
    model: Path, prompts: PromptBuilder, verbalizer: Verbalizer, examples: Sequence[Example], device: str = "cpu"
) -> list[dict[str, Any]]:
    """Return the examples' prompts with the merged model's fp32 log-probabilities, to be replayed by every runtime.

    They are computed on PyTorch's ``device``, or on the processor if that GPU does not hold the model in fp32.
    """
    scorer = _fp32_scorer(model, device)
    stored = []
    for example in examples:
        prompt = prompts.build(example.history, example.candidates)
        logprobs = log_softmax(verbalizer.logits(scorer, prompt))
        stored.append({**prompt._asdict(), "logprobs": np.round(logprobs, 6).tolist()})
    return stored


def _fp32_scorer(model: Path, device: str) -> "TorchScorer":
    from models.ranker.inference.runtimes import choose_runtime
    from models.ranker.inference.scorer import Runtime
    from models.ranker.inference.torch_scorer import TorchScorer

    runtime = Runtime(dtype="float32", threads=choose_runtime("cpu").threads, device=device)
    try:
        return TorchScorer(model, runtime)
    except InputError as error:
        if device == "cpu":
            raise
        logging.getLogger(__name__).warning("the probes are computed on the processor: %s", error)
        return TorchScorer(model, replace(runtime, device="cpu"))


def _save_adapter(model: Any, base: str, folder: Path) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(get_peft_model_state_dict(model, save_embedding_layers=False), folder / "adapter_model.safetensors")
    config = model.peft_config["default"]
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(str(folder))
