"""Trains a ranker and writes it, merged and ready to export: the second stage of LlamaRec (paper, section 3.2.2)."""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from client.contract import MAX_CANDIDATES
from models.metrics import summary
from models.ranker.base import EMBEDDED, base_fingerprint, find_base
from models.ranker.checkpoint import CHECKPOINT_FILE, CURVES_FILE
from models.ranker.examples import Example, Items, RandomPools, RetrievedPools, sample_examples
from models.ranker.fusion import fused_ranks, log_softmax, ndcg_by_weight
from models.ranker.opinions import fit_fusion
from models.ranker.options import RankerTraining
from models.ranker.prompt import RESPONSE, TOKENIZER_FILE, PromptBuilder, PromptSettings
from models.ranker.serving import FUSION_FILE, MODEL_FOLDER, PROBES_FILE
from models.ranker.verbalizer import VERBALIZER_FILE, Verbalizer, letter_ids
from models.retriever.candidates import Candidates, CandidateTable
from preprocessing.artifacts import is_finished, new_artifact, read_manifest
from preprocessing.data import Data, load_data
from preprocessing.errors import InputError

KIND = "ranker"
TRAINING_FOLDER = "ranker-training"
"""Checkpoint and TensorBoard events of the latest training; the checkpoint goes when the artifact stands."""
ADAPTER_FOLDER = "adapter"
METRICS_FILE = "metrics.json"
PROBES = 4
"""Validation prompts whose scores are stored, for every runtime to replay."""


def train_ranker(options: RankerTraining, artifacts: Path, base: str = EMBEDDED) -> dict[str, Any]:
    """Tunes the base on this data, chooses the retriever's weight, and writes ``artifacts/ranker``.

    The folder holds ``adapter/``, ``merged/`` (a Hugging Face folder in fp16), ``prompt.json``, ``verbalizer.json``,
    ``fusion.json``, ``probes.json``, ``metrics.json`` and ``curves.png``. A folder that these options and inputs made
    already is left as it is; a training of theirs that was interrupted goes on from its last checkpoint.

    Args:
        options: see :class:`RankerTraining`.
        artifacts: holds ``data`` and ``retriever``; converted bases are kept in ``base``.
        base: see :func:`models.ranker.base.find_base`.

    Returns:
        what ``metrics.json`` holds: validation metrics of the retriever, the untuned and the tuned model alone and
        fused, the weight, and the course of training.

    Raises:
        InputError: data, retriever or base are missing or do not belong together.
    """
    data_manifest = read_manifest(artifacts / "data", "data", "llamarec preprocess")
    retriever_manifest = read_manifest(artifacts / "retriever", "retriever", "llamarec train-retriever")
    if retriever_manifest.inputs.get("data") != data_manifest.fingerprint:
        raise InputError(
            f"{artifacts / 'retriever'} was trained on other data than {artifacts / 'data'} holds:"
            " run `llamarec train-retriever` again"
        )
    base_folder = find_base(base, artifacts / "base")
    folder = artifacts / "ranker"
    made_from = {
        "data": data_manifest.fingerprint,
        "retriever": retriever_manifest.fingerprint,
        "base": base_fingerprint(base_folder),
    }
    made_with = {**asdict(options), "base": base}
    if is_finished(folder, KIND, options=made_with, inputs=made_from):
        metrics: dict[str, Any] = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
        return metrics

    # torch, peft and bitsandbytes take seconds to import: not for a stage that is finished. bitsandbytes asks for an
    # optional package by way of a warning while it is imported.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from models.ranker.merge import save_merged
    from models.ranker.tuning import ranks_alone, score_examples, tune

    data = load_data(artifacts)
    tokenizer = Tokenizer.from_file(str(base_folder / TOKENIZER_FILE))
    settings = PromptSettings(
        max_history=options.max_history,
        title_tokens=options.title_tokens,
        max_tokens=options.max_tokens,
        candidates=options.candidates,
    )
    prompts = PromptBuilder(data.catalogue, tokenizer, settings)
    letters = letter_ids(tokenizer, RESPONSE, options.candidates)
    everyone = validation_examples(validation_table(artifacts, data, options.candidates), data)
    everyone = [everyone[place] for place in np.random.default_rng(options.seed).permutation(len(everyone))]
    sample = everyone[: options.validation_users]
    examples = training_examples(options, artifacts, data)

    facts: dict[str, Any] = {"dataset": data.name, "prompts": len(examples)}
    training = artifacts / TRAINING_FOLDER
    key = hashlib.sha256(json.dumps([made_with, made_from], sort_keys=True).encode()).hexdigest()
    with new_artifact(folder, KIND, options=made_with, inputs=made_from, facts=facts) as new:
        tuned = tune(options, base_folder, prompts, letters, examples, sample, training, key)
        validated = everyone if options.full_validation else sample
        rest = validated[len(sample) :]
        scored = [*tuned.logprobs, *score_examples(tuned.model, tuned.reading, prompts, rest)]
        truths, scores = [example.truth for example in validated], [example.scores for example in validated]
        weight, temperature = fit_fusion(scored, scores, truths)
        metrics = {
            "validation": {
                "users": len(validated),
                "retriever": summary(np.asarray(truths) + 1),
                "alone": summary(ranks_alone(scored, validated)),
                "fused": summary(fused_ranks(scored, scores, truths, weight)),
            },
            "sample": {
                "users": len(sample),
                "untuned": summary(ranks_alone(tuned.untuned, sample)),
                "alone": summary(ranks_alone(tuned.logprobs, sample)),
            },
            "weight": weight,
            "temperature": temperature,
            "NDCG@10_by_weight": {str(key): value for key, value in ndcg_by_weight(scored, scores, truths).items()},
            "best_step": tuned.best_step,
            "training": tuned.log,
        }
        facts["prompts_per_second"] = round(tuned.prompts_per_second, 3)
        _save_adapter(tuned.model, base, new / ADAPTER_FOLDER)
        save_merged(tuned.model, base_folder, new / MODEL_FOLDER)
        prompts.save_settings(new)
        verbalizer = tuned.reading.verbalizer()
        _write(new / VERBALIZER_FILE, verbalizer.stored())
        _write(new / FUSION_FILE, {"weight": weight, "temperature": temperature})
        _write(new / PROBES_FILE, probes(new / MODEL_FOLDER, prompts, verbalizer, sample[:PROBES]))
        _write(new / METRICS_FILE, metrics)
        shutil.copyfile(training / CURVES_FILE, new / CURVES_FILE)
    (training / CHECKPOINT_FILE).unlink()
    return metrics


def training_examples(options: RankerTraining, artifacts: Path, data: Data) -> list[Example]:
    """The examples that the options ask for, in the order of training; the retriever is cross-fitted for its lists.

    Args:
        options: see :class:`RankerTraining`.
        artifacts: holds ``data`` and ``retriever``.
        data: what ``artifacts/data`` holds.
    """
    pools: RandomPools | RetrievedPools
    if options.negatives in ("random", "popular"):
        counts = data.catalogue.counts if options.negatives == "popular" else None
        pools = RandomPools(data.catalogue.trained, options.candidates, options.pools, counts)
    else:
        from models.ranker.crossfit import cross_fit

        fitted = cross_fit(artifacts, data, folds=options.folds, candidates=options.candidates)
        pools = RetrievedPools(fitted.lists, options.order, options.pools)
    sample = partial(sample_examples, data.training, per_user=options.max_user_prompts)
    strangers: list[Example] = []
    if options.random_prompts:
        random = RandomPools(data.catalogue.trained, options.candidates, options.pools)
        strangers = sample(random, count=options.random_prompts, seed=(options.seed, 1))
    return [*strangers, *sample(pools, count=options.max_prompts, seed=options.seed)]


def validation_table(artifacts: Path, data: Data, candidates: int) -> CandidateTable:
    """The retriever's candidates for every user's validation item: those it stored, or as many as are asked for."""
    table = CandidateTable.read(artifacts / "retriever" / "candidates-validation.parquet")
    if candidates == MAX_CANDIDATES:
        return table
    from models.ranker.crossfit import retrieve
    from models.retriever.training import load_retriever

    model, options = load_retriever(artifacts / "retriever")
    rows: list[Candidates] = retrieve(model, options.max_length, data.training, candidates)
    return CandidateTable(data.users, rows, data.validation, table.ranks)


def validation_examples(table: CandidateTable, data: Data) -> list[Example]:
    """Users whose true item is among their candidates: examples in the retriever's order.

    Args:
        table: the retriever's candidates for validation.
        data: gives the histories.

    Raises:
        InputError: the retriever found the true item of no user.
    """
    histories: Mapping[str, Items] = dict(zip(data.users, data.training, strict=True))
    examples = []
    for user, row, item in zip(table.users, table.candidates, table.truth, strict=True):
        found = np.flatnonzero(row.items == item)
        if len(found):
            examples.append(Example(histories[user], row.items, int(found[0]), row.scores))
    if not examples:
        raise InputError(
            f"the retriever has the next item of none of {len(table.users)} users among its candidates, so the ranker"
            " has nothing to validate on: train the retriever longer"
        )
    return examples


def probes(
    model: Path, prompts: PromptBuilder, verbalizer: Verbalizer, examples: Sequence[Example]
) -> list[dict[str, Any]]:
    """A few prompts and the merged model's fp32 log-probabilities, which every runtime replays."""
    from models.ranker.scoring import Runtime, TorchScorer, choose_runtime

    scorer = TorchScorer(model, Runtime(dtype="float32", threads=choose_runtime("cpu").threads))
    stored = []
    for example in examples:
        prompt = prompts.build(example.history, example.candidates)
        logprobs = log_softmax(verbalizer.logits(scorer, prompt))
        stored.append({**prompt._asdict(), "logprobs": np.round(logprobs, 6).tolist()})
    return stored


def _save_adapter(model: Any, base: str, folder: Path) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(get_peft_model_state_dict(model, save_embedding_layers=False), folder / "adapter_model.safetensors")
    config = model.peft_config["default"]
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(str(folder))


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
