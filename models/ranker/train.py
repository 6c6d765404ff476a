"""Trains a ranker and writes it, merged and ready to export: the second stage of LlamaRec (paper, section 3.2.2)."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from models.metrics import summary
from models.ranker.base import EMBEDDED, base_fingerprint, find_base
from models.ranker.examples import Example, Items, sample_examples
from models.ranker.fusion import choose_weight, fused_ranks, log_softmax
from models.ranker.options import RankerTraining
from models.ranker.prompt import RESPONSE, TOKENIZER_FILE, PromptBuilder, PromptSettings
from models.ranker.serving import FUSION_FILE, LETTERS_FILE, MODEL_FOLDER, PROBES_FILE
from models.ranker.verbalizer import LETTERS, letter_ids
from models.retriever.candidates import CandidateTable
from preprocessing.artifacts import is_finished, new_artifact, read_manifest
from preprocessing.data import load_data
from preprocessing.errors import InputError

KIND = "ranker"
ADAPTER_FOLDER = "adapter"
METRICS_FILE = "metrics.json"
PROBES = 4
"""Validation prompts whose scores are stored, for every runtime to replay."""


def train_ranker(options: RankerTraining, artifacts: Path, base: str = EMBEDDED) -> dict[str, Any]:
    """Tunes the base on this data, chooses the retriever's weight, and writes ``artifacts/ranker``.

    The folder holds ``adapter/``, ``merged/`` (a Hugging Face folder in fp16), ``prompt.json``, ``letters.json``,
    ``fusion.json``, ``probes.json`` and ``metrics.json``. A folder that these options and inputs made already is left
    as it is.

    Args:
        options: see :class:`RankerTraining`.
        artifacts: holds ``data`` and ``retriever``; converted bases are kept in ``base``.
        base: see :func:`models.ranker.base.find_base`.

    Returns:
        what ``metrics.json`` holds: validation metrics of the retriever, the untuned and the tuned letters and both
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
    from models.ranker.tuning import letter_ranks, tune

    data = load_data(artifacts)
    tokenizer = Tokenizer.from_file(str(base_folder / TOKENIZER_FILE))
    settings = PromptSettings(
        max_history=options.max_history, title_tokens=options.title_tokens, max_tokens=options.max_tokens
    )
    prompts = PromptBuilder(data.catalogue, tokenizer, settings)
    letters = letter_ids(tokenizer, RESPONSE)
    table = CandidateTable.read(artifacts / "retriever" / "candidates-validation.parquet")
    histories = dict(zip(data.users, data.training, strict=True))
    validation, scores = validation_examples(table, histories, count=options.validation_users, seed=options.seed)
    pool = (
        np.arange(1, data.catalogue.trained + 1, dtype=np.int32)
        if options.negatives == "random"
        else np.concatenate([row.items for row in table.candidates])
    )
    examples = sample_examples(data.training, pool, count=options.max_prompts, seed=options.seed)

    facts: dict[str, Any] = {"dataset": data.name, "prompts": len(examples)}
    with new_artifact(folder, KIND, options=made_with, inputs=made_from, facts=facts) as new:
        tuned = tune(options, base_folder, prompts, letters, examples, validation)
        truths = [example.truth for example in validation]
        weight, ndcg_by_weight = choose_weight(tuned.letters, scores, truths)
        metrics = {
            "validation": {
                "users": len(validation),
                "retriever": summary(np.asarray(truths) + 1),
                "untuned_letters": summary(letter_ranks(tuned.untuned, validation)),
                "letters": summary(letter_ranks(tuned.letters, validation)),
                "fused": summary(fused_ranks(tuned.letters, scores, truths, weight)),
            },
            "weight": weight,
            "NDCG@10_by_weight": {str(key): value for key, value in ndcg_by_weight.items()},
            "best_step": tuned.best_step,
            "training": tuned.log,
        }
        facts["prompts_per_second"] = round(tuned.prompts_per_second, 3)
        _save_adapter(tuned.model, base, new / ADAPTER_FOLDER)
        save_merged(tuned.model, base_folder, new / MODEL_FOLDER)
        prompts.save_settings(new)
        _write(new / LETTERS_FILE, dict(zip(LETTERS, letters, strict=True)))
        _write(new / FUSION_FILE, {"weight": weight})
        _write(new / PROBES_FILE, probes(new / MODEL_FOLDER, prompts, letters, validation[:PROBES]))
        _write(new / METRICS_FILE, metrics)
    return metrics


def validation_examples(
    table: CandidateTable, histories: Mapping[str, Items], *, count: int | None, seed: int
) -> tuple[list[Example], list[NDArray[np.float32]]]:
    """Users whose true item is among their candidates: examples in the retriever's order, and its scores of each.

    Args:
        table: the retriever's candidates for validation.
        histories: training part of each user's sequence.
        count: users to sample; all of them if absent.
        seed: of the sample.

    Raises:
        InputError: the retriever found the true item of no user.
    """
    found = [row for row, item in enumerate(table.truth) if item in table.candidates[row].items]
    if not found:
        raise InputError(
            f"the retriever has the next item of none of {len(table.users)} users among its candidates, so the ranker"
            " has nothing to validate on: train the retriever longer"
        )
    rows = np.random.default_rng(seed).permutation(found)[:count]
    examples = []
    for row in rows:
        items = table.candidates[row].items
        truth = int(np.flatnonzero(items == table.truth[row])[0])
        examples.append(Example(histories[table.users[row]], items, truth))
    return examples, [table.candidates[row].scores for row in rows]


def probes(
    model: Path, prompts: PromptBuilder, letters: Sequence[int], examples: Sequence[Example]
) -> list[dict[str, Any]]:
    """Token ids of a few prompts and the merged model's fp32 letter log-probabilities, which every runtime replays."""
    from models.ranker.scoring import LetterScorer, Runtime, choose_runtime

    scorer = LetterScorer(model, letters, Runtime(dtype="float32", threads=choose_runtime("cpu").threads))
    stored = []
    for example in examples:
        tokens = prompts.build(example.history, example.candidates)
        logprobs = log_softmax(scorer(tokens)[: len(example.candidates)])
        stored.append({"tokens": tokens, "logprobs": np.round(logprobs, 6).tolist()})
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
