"""Training with titles, signals and a second retriever: the files that it writes, and what they retrieve."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from made_up_data import COLOURED, ITEMS, NUMBERED, write_circle
from safetensors.torch import load_file

from models.metrics import recall, summary
from models.retriever import training
from models.retriever.candidates import CandidateTable
from models.retriever.options import PRESETS, RetrieverTraining
from models.retriever.trained import TrainedRetriever
from models.retriever.training import train_retriever
from models.signals.signals import SIGNALS
from models.titles.vectors import KIND, save_vectors
from models.titles.words import WordEncoder
from preprocessing.artifacts import new_artifact, read_manifest
from preprocessing.catalogue import ITEMS_FILE
from preprocessing.data import load_data
from preprocessing.errors import InputError

UNTRAINED = ("Red Bee", "Blue Newt", "Newt")
BRIEF = RetrieverTraining(
    width=8, blocks=1, max_length=6, epochs=12, validate_every=4, batch_size=16, seed=3, device="cpu"
)
TINY = {
    "model": "sasrec",
    "width": 8,
    "blocks": 1,
    "max_length": 8,
    "epochs": 12,
    "validate_every": 4,
    "batch_size": 16,
}
"""Preset of the second retriever, of another architecture and another length than the first."""
NEW_OPTIONS = {"titles", "untrained", "signals", "pool", "second"}
"""Options that earlier versions did not have."""


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """Give the second retriever a preset that trains in a second; its name is checked again when options are read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)
        yield


def whole_options() -> RetrieverTraining:
    return replace(BRIEF, titles="words", signals=True, second="tiny")


def circle(folder: Path, titles=(*COLOURED, *UNTRAINED)) -> Path:
    """Write the data set into a new folder, and return the folder."""
    folder.mkdir(exist_ok=True)
    return write_circle(folder, titles)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Return the artifacts of a training with titles, signals and a second retriever, on items of which 3 are new."""
    folder = circle(tmp_path_factory.mktemp("whole"))
    train_retriever(whole_options(), folder)
    return folder


@pytest.fixture(scope="module")
def trained(whole) -> TrainedRetriever:
    return TrainedRetriever.load(whole / "retriever")


def test_the_folder_holds_both_models_words_and_signals(whole):
    """Each model has weights, options, items, and how it reads titles; the stage has signals and candidates."""
    folder, words = whole / "retriever", {"projection.safetensors", "words.json", "words.safetensors"}
    model = {"model.safetensors", "config.json", ITEMS_FILE, *words}
    assert {path.name for path in folder.iterdir()} == {
        *model,
        *("second", "signals.json", "signals.safetensors"),
        *("candidates-validation.parquet", "candidates-test.parquet", "metrics.json", "curve.png", "manifest.json"),
    }
    assert {path.name for path in (folder / "second").iterdir()} == model
    assert read_manifest(folder, "retriever", "").facts["items"] == ITEMS + 3
    assert {path.name for path in whole.iterdir()} == {"data", "retriever", "logs"}
    assert {path.name for path in (whole / "logs").iterdir()} == {"retriever", "second-retriever"}


def test_metrics_are_those_of_the_stage_and_of_the_model_alone(whole):
    """Both are counted from the ranks in the candidates files, and the weights are named by retriever and signal."""
    metrics = json.loads((whole / "retriever" / "metrics.json").read_text())
    for split in ("validation", "test"):
        table = CandidateTable.read(whole / "retriever" / f"candidates-{split}.parquet")
        for found, ranks in ((metrics, table.ranks), (metrics["model_alone"], table.model_ranks)):
            assert found[split] == pytest.approx({**summary(ranks), "Recall@20": recall(ranks, 20)})
    assert list(metrics["weights"]) == ["retriever", "second_retriever", *SIGNALS]
    assert json.loads((whole / "retriever" / "signals.json").read_text()) == {
        "pool": 200,
        "weights": metrics["weights"],
    }


def test_signals_help_a_model_that_has_learned_little(whole):
    """The next item is certain from the transitions of other users, and a model of 12 epochs does not know it.

    The weights are fitted on validation users, and help on their test items too.
    """
    metrics = json.loads((whole / "retriever" / "metrics.json").read_text())
    assert metrics["weights"]["transitions"] > 0
    for split in ("validation", "test"):
        assert metrics[split]["MRR@10"] > metrics["model_alone"][split]["MRR@10"] + 0.2


def test_the_loaded_stage_writes_the_same_candidates(whole, trained, tmp_path):
    """Every column of both files, to the last bit."""
    data = load_data(whole)
    assert [model.options for model in trained.models] == [whole_options(), whole_options().second_options()]
    assert [model.items for model in trained.models] == [ITEMS + 3] * 2
    assert not any(model.model.training for model in trained.models)
    for split, histories, truth in (
        ("validation", data.training, data.validation),
        ("test", data.test_histories(), data.test),
    ):
        trained.write_candidates(tmp_path / "again.parquet", data.users, histories, truth, 20)
        stored = pq.read_table(whole / "retriever" / f"candidates-{split}.parquet")
        assert pq.read_table(tmp_path / "again.parquet").equals(stored)


def test_the_second_retriever_shares_titles_seed_and_mask():
    """Everything else is its preset's: the first retriever's own options do not apply to it.

    A preset that says how titles are read is followed, and both retrievers score the same items: without titles in the
    first, the trained ones alone.
    """
    options = replace(whole_options(), seed=9, mask="last-window", untrained=False)
    shared = {"titles": "words", "seed": 9, "mask": "last-window", "untrained": False, "device": "cpu"}
    assert options.second_options() == RetrieverTraining(**PRESETS["tiny"], **shared)
    mixed = replace(BRIEF, titles="none", signals=True, second="default").second_options()
    assert (mixed.titles, mixed.signals, mixed.whole_catalogue) == ("words", False, False)


@pytest.mark.parametrize("untrained", [True, False])
def test_items_that_no_sequence_contains_are_retrieved_if_wanted(tmp_path, untrained):
    """With ``untrained``, items 31 to 33 are candidates by their titles, and may be in a history; without, neither."""
    artifacts = circle(tmp_path / "artifacts")
    train_retriever(replace(BRIEF, titles="words", untrained=untrained), artifacts)
    (model,) = TrainedRetriever.load(artifacts / "retriever").models
    assert model.items == (ITEMS + 3 if untrained else ITEMS)
    history = np.array([4, 5], np.int32)
    (found,) = TrainedRetriever.load(artifacts / "retriever").retrieve([history], 40)
    assert set(found.items.tolist()) == set(range(1, model.items + 1)) - {4, 5}
    assert not (artifacts / "retriever" / "signals.json").exists()
    if untrained:
        (found,) = TrainedRetriever.load(artifacts / "retriever").retrieve([np.array([4, 31], np.int32)], 40)
        assert {6, 32} <= set(found.items.tolist())
        assert 31 not in found.items


def test_the_words_of_the_training_encode_a_new_title(whole):
    """The stored encoder and projection give the vector of an item that is added later.

    For item 31, which was in the catalogue and is untrained, it is the vector that is served.
    """
    folder = whole / "retriever"
    encoder = WordEncoder.load(folder)
    projection = load_file(folder / "projection.safetensors")["projection"].numpy()
    vector = encoder.vectors(encoder.rows([UNTRAINED[0]]))[0] @ projection.T
    served = load_file(folder / "model.safetensors")["embedding.weight"].numpy()
    assert served.shape == (ITEMS + 4, 8)
    np.testing.assert_allclose(vector, served[ITEMS + 1], atol=1e-6)


def test_titles_without_words_in_common_are_refused(tmp_path):
    """Nothing is trained, and the error names the remedy."""
    artifacts = circle(tmp_path / "artifacts", NUMBERED)
    with pytest.raises(InputError, match="train with --titles none, or give the items titles"):
        train_retriever(replace(BRIEF, titles="words"), artifacts)
    assert [path.name for path in artifacts.iterdir()] == ["data"]


def test_signals_need_no_common_words(tmp_path):
    """Without titles' words, likeness is 0 for all items; popularity and transitions are weighed all the same."""
    artifacts = circle(tmp_path / "artifacts", NUMBERED)
    metrics = train_retriever(replace(BRIEF, signals=True), artifacts)
    assert list(metrics["weights"]) == ["retriever", *SIGNALS]
    assert [metrics["weights"][f"likeness_{kind}"] for kind in ("mean", "max", "last")] == [0, 0, 0]
    assert metrics["weights"]["transitions"] > 0
    assert not (artifacts / "retriever" / "words.json").exists()


def test_a_finished_training_is_left_alone(whole, monkeypatch):
    """With the same options on the same data neither model is trained again, and the metrics are read from the file."""
    monkeypatch.setattr(training, "fit", lambda *_: pytest.fail("trained again"))
    assert train_retriever(whole_options(), whole) == json.loads((whole / "retriever" / "metrics.json").read_text())


def test_an_interrupted_second_training_keeps_the_first(whole, tmp_path, monkeypatch):
    """Interrupted while the second retriever is trained, the first is not trained again.

    The weights of both are bit-identical to an uninterrupted training's. The watcher sees the first retriever alone.
    """
    artifacts, fit = circle(tmp_path / "artifacts"), training.fit

    def interrupted(options, *rest):
        if options.model == TINY["model"]:
            raise KeyboardInterrupt
        return fit(options, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(training, "fit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_retriever(whole_options(), artifacts)
    assert (artifacts / training.CHECKPOINTS[0]).is_file()
    assert not (artifacts / "retriever").exists()
    seen = []
    train_retriever(whole_options(), artifacts, watch=lambda step, _: seen.append(step))
    assert seen == []
    for name in ("model.safetensors", "second/model.safetensors", "signals.safetensors"):
        one, other = (load_file(folder / "retriever" / name) for folder in (whole, artifacts))
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert not list(artifacts.glob("*.pt"))


# --- a language model's title vectors


def write_titles(folder: Path, seed: int) -> None:
    vectors = np.random.default_rng(seed).normal(size=(ITEMS + 4, 5)).astype(np.float32)
    vectors[0] = 0
    with new_artifact(folder / "titles", KIND, options={}, inputs={}) as partial:
        save_vectors(partial, vectors)


def test_a_language_models_titles_are_an_input_of_the_training(tmp_path, monkeypatch):
    """The manifest has their fingerprint, so that with other vectors the retriever is trained again.

    Untrained items are retrieved by the projection of their vectors, and there is no encoder of words.
    """
    artifacts, options = circle(tmp_path / "artifacts"), replace(BRIEF, titles="model")
    with pytest.raises(InputError, match="titles does not exist"):
        train_retriever(options, artifacts)
    write_titles(artifacts, seed=0)
    train_retriever(options, artifacts)
    manifest = read_manifest(artifacts / "retriever", "retriever", "")
    assert manifest.inputs["titles"] == read_manifest(artifacts / "titles", KIND, "").fingerprint
    assert not (artifacts / "retriever" / "words.json").exists()
    assert load_file(artifacts / "retriever" / "projection.safetensors")["projection"].shape == (8, 5)
    assert TrainedRetriever.load(artifacts / "retriever").models[0].items == ITEMS + 3

    def begun(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "fit", begun)
    train_retriever(options, artifacts)
    write_titles(artifacts, seed=1)
    with pytest.raises(KeyboardInterrupt):
        train_retriever(options, artifacts)


# --- artifacts of an earlier version


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """Return the artifacts of a training without titles and signals."""
    folder = circle(tmp_path_factory.mktemp("plain"))
    train_retriever(BRIEF, folder)
    return folder


def test_without_titles_and_signals_the_artifact_is_as_before(plain):
    """No file is added but the catalogue, no metric either, and the manifest counts the trained items."""
    folder = plain / "retriever"
    assert {path.name for path in folder.iterdir()} == {
        *("model.safetensors", "config.json", ITEMS_FILE, "metrics.json", "curve.png", "manifest.json"),
        *("candidates-validation.parquet", "candidates-test.parquet"),
    }
    metrics = json.loads((folder / "metrics.json").read_text())
    assert not {"model_alone", "weights"} & set(metrics)
    assert read_manifest(folder, "retriever", "").facts["items"] == ITEMS
    assert load_file(folder / "model.safetensors")["embedding.weight"].shape == (ITEMS + 1, 8)


def test_an_artifact_of_an_earlier_version_loads(plain, tmp_path):
    """It has no catalogue, its options lack the new ones, and its candidates the column ``model_rank``.

    It retrieves what it did.
    """
    old, stored = tmp_path / "retriever", plain / "retriever"
    manifest = read_manifest(stored, "retriever", "")
    made_with = {name: value for name, value in manifest.options.items() if name not in NEW_OPTIONS}
    assert set(manifest.options) - set(made_with) == NEW_OPTIONS
    with new_artifact(old, "retriever", options=made_with, inputs=manifest.inputs) as partial:
        for name in set(manifest.files) - {ITEMS_FILE}:
            shutil.copy(stored / name, partial)
        config = json.loads((partial / "config.json").read_text())
        (partial / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in NEW_OPTIONS}))
        for split in ("validation", "test"):
            table = pq.read_table(partial / f"candidates-{split}.parquet").drop_columns("model_rank")
            pq.write_table(table, partial / f"candidates-{split}.parquet")
    loaded, histories = TrainedRetriever.load(old), load_data(plain).training
    assert asdict(loaded.options) == asdict(BRIEF)
    expected = TrainedRetriever.load(stored).retrieve(histories, 20)
    assert [found.items.tolist() for found in loaded.retrieve(histories, 20)] == [
        row.items.tolist() for row in expected
    ]
    table = CandidateTable.read(old / "candidates-test.parquet")
    assert table.model_ranks.tolist() == table.ranks.tolist()
