"""The export is complete or refused, does not repeat finished work, and requires artifacts that belong together."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from google.protobuf import text_format
from pipeline import BRIEF_RETRIEVER, copied, with_retriever
from tritonclient.grpc.model_config_pb2 import ModelConfig

from export.config import CONFIG, Serving, model_configs
from export.repository import COMMITTED_REPOSITORY, PASS_FILE, Export, export, write_store_models
from models.ranker import precision
from models.ranker.inference import runtimes
from models.ranker.inference.ranker import read_runtime
from models.ranker.inference.scorer import Runtime
from models.retriever.options import PRESETS
from models.retriever.trained import TrainedRetriever
from models.retriever.training import train_retriever
from preprocessing.artifacts import MANIFEST, new_artifact, read_manifest
from preprocessing.catalogue import ITEMS_FILE
from preprocessing.data import load_data
from preprocessing.errors import InputError
from serving.contract import STEPS, STORE_MODELS
from serving.layout import exported_release, step_artifact
from serving.offline import ExportedSteps

OPTIONS = Export(threads=1)


def test_every_step_carries_the_same_release(artifacts, repository):
    """The hash that export returns is stored in the manifests of all four steps."""
    assert exported_release(repository) == export(OPTIONS, artifacts, repository)


def test_weights_are_linked_and_nothing_else(artifacts, repository):
    """The exported weights are the trained file itself, read-only; configuration and tokenizer are copies."""
    trained, exported = artifacts / "ranker" / "merged", step_artifact(repository, "ranker") / "merged"
    same = {path.name for path in trained.iterdir() if path.samefile(exported / path.name)}
    assert same == {"model.safetensors"}
    assert not (trained / "model.safetensors").stat().st_mode & 0o222
    assert (exported / "config.json").read_bytes() == (trained / "config.json").read_bytes()


def test_another_export_of_the_same_artifacts_touches_nothing(artifacts, repository):
    """Finished steps are recognised by their manifests and not rewritten: the files keep their inodes."""
    before = [(step_artifact(repository, step) / MANIFEST).stat().st_ino for step in STEPS]
    export(OPTIONS, artifacts, repository)
    assert [(step_artifact(repository, step) / MANIFEST).stat().st_ino for step in STEPS] == before


def test_a_repository_elsewhere_has_the_committed_models(repository):
    """The committed steps are copied byte for byte, and only the queue of their configurations differs.

    The time of the measured pass determines the queue.
    """
    seconds = json.loads((step_artifact(repository, "ranker") / PASS_FILE).read_text())["seconds"]
    expected = model_configs(Serving(pass_seconds=seconds))
    for name, config in expected.items():
        assert text_format.Parse((repository / name / CONFIG).read_text(), ModelConfig()) == config
    for committed in COMMITTED_REPOSITORY.glob("*/1/model.py"):
        assert (repository / committed.relative_to(COMMITTED_REPOSITORY)).read_bytes() == committed.read_bytes()


def test_the_models_beside_the_releases_are_written_once(tmp_path):
    """A running server would reload a file that is written again, so only one with other content is."""

    def files():
        return {
            path.relative_to(tmp_path).as_posix(): path.stat().st_ino for path in tmp_path.rglob("*") if path.is_file()
        }

    write_store_models(tmp_path, Serving())
    first = files()
    assert len(first) == 2 * len(STORE_MODELS)
    write_store_models(tmp_path, Serving())
    assert files() == first
    write_store_models(tmp_path, Serving(store="sqlite:///x"))
    changed = {path for path, inode in files().items() if inode != first[path]}
    assert changed == {f"{model}/{CONFIG}" for model in STORE_MODELS}


def test_a_half_done_export_is_refused(artifacts, repository, tmp_path):
    """An export that is killed between two steps leaves steps of two releases.

    Reading such a repository is refused, and another export repairs it.
    """
    half = tmp_path / "repository"
    shutil.copytree(repository, half)
    manifest = step_artifact(half, "ranker") / MANIFEST
    content = json.loads(manifest.read_text())
    content["facts"]["release"] = "of another export"
    content["options"] = {}
    manifest.write_text(json.dumps(content))
    with pytest.raises(InputError, match="different exports: run `llamarec export` again"):
        exported_release(half)
    assert export(OPTIONS, artifacts, half) == exported_release(half) == exported_release(repository)


def test_a_missing_stage_is_named_with_its_command(artifacts, tmp_path):
    """Without a ranker there is nothing to serve, and the error names the command to run."""
    partial = copied(artifacts, tmp_path / "artifacts", "data", "retriever")
    with pytest.raises(InputError, match="run `llamarec train-ranker` first"):
        export(OPTIONS, partial, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_artifacts_of_another_data_set_are_refused(artifacts, tmp_path):
    """A retriever is refused if its manifest names other data than the data folder of the same artifacts."""
    mixed = copied(artifacts, tmp_path / "artifacts", "data", "retriever", "ranker")
    manifest = mixed / "data" / MANIFEST
    content = json.loads(manifest.read_text())
    content["fingerprint"] = "of another data set"
    manifest.write_text(json.dumps(content))
    with pytest.raises(InputError, match="made from other data"):
        export(OPTIONS, mixed, tmp_path / "repository")


def raw_history(data, user):
    return [data.catalogue.raw(int(item)).decode() for item in data.training[user]]


def test_the_features_know_the_trained_items(artifacts, repository):
    """The vocabulary of a retriever without titles, which the history is encoded with, is what it was trained on.

    The ranker of the tests reads letters and was trained on 20 candidates, which is the most that it orders.
    """
    stored = json.loads((step_artifact(repository, "features") / "vocabulary.json").read_text())
    assert stored == {"items": load_data(artifacts).catalogue.trained, "candidates": 20, "titles": False}


@pytest.mark.thorough
def test_titles_signals_and_a_second_retriever_are_exported(artifacts, tmp_path, monkeypatch):
    """The exported steps know the whole catalogue, and give the trained stage's candidates in its order.

    Log-probabilities agree within 1e-4. An untrained item that is sent in a history is not skipped.
    """
    tiny = {"model": "sasrec", "width": 8, "blocks": 1, "max_length": 20, "epochs": 1, "validate_every": 50}
    monkeypatch.setitem(PRESETS, "tiny", tiny)
    training = tmp_path / "training"
    training.mkdir()
    (training / "data").symlink_to(artifacts / "data")
    brief = replace(BRIEF_RETRIEVER, epochs=1, validate_every=100, untrained=True)
    train_retriever(replace(brief, titles="words", signals=True, second="tiny"), training)
    whole = with_retriever(artifacts, tmp_path / "artifacts", training / "retriever")
    export(OPTIONS, whole, tmp_path / "repository")
    steps, data = ExportedSteps.load(tmp_path / "repository"), load_data(artifacts)
    trained = TrainedRetriever.load(training / "retriever")
    assert len(trained.models) == 2
    assert trained.models[0].items == len(data.catalogue) > data.catalogue.trained
    for history, expected in zip(data.training[:20], trained.retrieve(data.training[:20], 20), strict=True):
        found = steps.retriever.candidates(history, np.empty(0, np.int32))
        assert found.items.tolist() == expected.items.tolist()
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    untrained = data.catalogue.raw(len(data.catalogue)).decode()
    assert steps.features.encode([untrained.encode()]).history.tolist() == [len(data.catalogue)]
    assert len(steps.recommend([*raw_history(data, 0), untrained])) == 20


@pytest.mark.thorough
def test_artifacts_of_an_earlier_version_are_exported(artifacts, tmp_path):
    """A retriever without the present options, catalogue and column of the candidates is served as before.

    The candidates are those of the same retriever in the present format, with its logits' log-probabilities.
    """
    (tmp_path / "data").symlink_to(artifacts / "data")
    plain = replace(BRIEF_RETRIEVER, titles="none", signals=False, untrained=True, epochs=1, validate_every=100)
    train_retriever(plain, tmp_path)
    old, stored = tmp_path / "old", tmp_path / "retriever"
    new = ("titles", "untrained", "signals", "pool", "second")
    manifest = read_manifest(stored, "retriever", "")
    made_with = {name: value for name, value in manifest.options.items() if name not in new}
    with new_artifact(old, "retriever", options=made_with, inputs=manifest.inputs, facts={**manifest.facts}) as partial:
        for name in set(manifest.files) - {ITEMS_FILE}:
            shutil.copy(stored / name, partial)
        config = json.loads((partial / "config.json").read_text())
        (partial / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in new}))
        for split in ("validation", "test"):
            table = pq.read_table(partial / f"candidates-{split}.parquet").drop_columns("model_rank")
            pq.write_table(table, partial / f"candidates-{split}.parquet")
    export(OPTIONS, with_retriever(artifacts, tmp_path / "artifacts", old), tmp_path / "repository")
    steps, histories = ExportedSteps.load(tmp_path / "repository"), load_data(artifacts).training[:20]
    for history, expected in zip(histories, TrainedRetriever.load(stored).retrieve(histories, 20), strict=True):
        found = steps.retriever.candidates(history, np.empty(0, np.int32))
        assert found.items.tolist() == expected.items.tolist()
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    assert len(steps.recommend(raw_history(load_data(artifacts), 0))) == 20


def test_a_ranker_whose_weights_changed_is_not_served(repository, tmp_path):
    """The ranker must reproduce the probe scores that were stored at training; otherwise its files have changed."""
    spoilt = tmp_path / "repository"
    shutil.copytree(repository, spoilt)
    probes = step_artifact(spoilt, "ranker") / "probes.json"
    content = json.loads(probes.read_text())
    content[0]["logprobs"] = content[0]["logprobs"][::-1]
    probes.write_text(json.dumps(content))
    with pytest.raises(InputError, match="probe prompt 0"):
        ExportedSteps.load(spoilt)


@pytest.mark.parametrize("options", [{"dtype": "int3"}, {"threads": 0}, {"forward": "fast"}, {"batching": "loose"}])
def test_options_that_no_runtime_has_are_refused(artifacts, tmp_path, options):
    """A precision or thread count that does not exist is detected before anything is written."""
    with pytest.raises(InputError):
        export(Export(**options), artifacts, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_openvino_on_a_gpu_is_refused(artifacts, tmp_path, monkeypatch):
    """OpenVINO runs on the CPU: with a GPU the export fails before any work, and without a device it uses the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="use --device cpu, or --runtime torch"):
        export(Export(backend="openvino", device="gpu"), artifacts, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()
    assert Export(backend="openvino").runtime().device == "cpu"


def test_the_packed_forward_is_pytorchs(monkeypatch):
    """Naming PyTorch's layers chooses PyTorch where OpenVINO is the default, and contradicts OpenVINO by name."""
    monkeypatch.setattr(
        "export.repository.choose_runtime", lambda device: Runtime(runtime="openvino", dtype="bfloat16")
    )
    expected = Runtime(runtime="torch", dtype="bfloat16", forward="packed", batching="tolerant")
    assert Export(forward="packed", batching="tolerant").runtime() == expected
    with pytest.raises(InputError, match="--forward packed is for PyTorch: use --runtime torch, or leave it out"):
        Export(backend="openvino", forward="packed").runtime()


@pytest.mark.thorough
def test_a_model_that_openvino_does_not_know_is_exported_for_pytorch(artifacts, tmp_path, monkeypatch, caplog):
    """A processor with bf16 would choose OpenVINO, which knows few architectures (huggingface/optimum-intel#1411).

    The export falls back to PyTorch and says so; OpenVINO asked for by name is refused before anything is written.
    """
    monkeypatch.setattr(precision, "processor_has_bf16", lambda: True)
    monkeypatch.setattr(runtimes, "openvino_runs", lambda folder: False)
    export(Export(threads=1), artifacts, tmp_path / "repository")
    runtime = read_runtime(step_artifact(tmp_path / "repository", "ranker"))
    assert runtime == Runtime(runtime="torch", dtype="bfloat16", threads=1)
    assert "the ranker runs in PyTorch: OpenVINO's graph does not know this model" in caplog.text
    with pytest.raises(InputError, match="export with --runtime torch"):
        export(Export(backend="openvino"), artifacts, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("device", ["gpu:3", "tpu"])
def test_a_device_that_is_not_there_is_refused_before_any_work(artifacts, tmp_path, device):
    """Nothing is written for a device that does not exist; training makes the same check."""
    with pytest.raises(InputError, match=device):
        export(Export(device=device), artifacts, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()
