"""Titles encoded by a base language model, and a retriever that is trained with them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up_data import COLOURED, ITEMS, write_circle
from tiny import tiny_base
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from models.ranker.title_states import TOKENS, encode_titles, fit_whitening, title_states
from models.retriever.options import RetrieverTraining
from models.retriever.trained import TrainedRetriever
from models.retriever.training import train_retriever
from models.titles.vectors import KIND, load_vectors, save_vectors
from preprocessing.artifacts import new_artifact
from preprocessing.errors import InputError

TITLES = ["Red Fox", "", "A much longer title, with a comma and the number 1984", "Owl", "word " * 100]
BRIEF = RetrieverTraining(width=8, blocks=1, epochs=1, validate_every=5, titles="model")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("layer", [1, 2])
def test_a_title_is_the_mean_of_its_tokens_states(base: Path, layer: int):
    """The reference runs transformers on each title alone, without padding; an empty title has no state."""
    found = title_states(base, TITLES, layer)
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    for title, state in zip(TITLES, found, strict=True):
        ids = tokenizer.encode(title, add_special_tokens=False).ids[:TOKENS]
        if not ids:
            assert not state.any()
            continue
        # The decoder's layers give hidden_states[layer]; transformers normalises only the last of them.
        with torch.no_grad():
            inner = model.model
            inner.norm = torch.nn.Identity()
            states = inner(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[layer]
        np.testing.assert_allclose(state, states[0].mean(dim=0).numpy(), atol=1e-5)


def test_whitened_states_are_uncorrelated_and_vary_equally():
    """By definition of whitening: before scaling to length 1, the covariance of the states is the identity."""
    rng = np.random.default_rng(0)
    states = (rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)) + 3).astype(np.float32)
    whitening = fit_whitening(states)
    projected = (states - whitening.mean) @ whitening.projection
    np.testing.assert_allclose(np.cov(projected.T, bias=True), np.eye(6), atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(whitening(states), axis=1), 1, atol=1e-5)
    assert not whitening(np.zeros((1, 6), np.float32)).any()


def test_a_retriever_trains_with_the_stored_vectors(base: Path, tmp_path: Path, monkeypatch):
    """The vectors are encoded once; the training names them among its inputs, and knows the untrained items too."""
    artifacts = write_circle(tmp_path, (*COLOURED, "Red Hen", "Blue Bee"))
    vectors = encode_titles(artifacts, str(base))
    assert len(vectors) == ITEMS + 3
    assert not vectors[0].any()
    monkeypatch.setattr("models.ranker.title_states.title_states", None)  # a second call must not encode again
    np.testing.assert_array_equal(encode_titles(artifacts, str(base)), vectors)
    train_retriever(replace(BRIEF, signals=True), artifacts)
    trained = TrainedRetriever.load(artifacts / "retriever")
    assert trained.models[0].items == ITEMS + 2


def test_vectors_that_are_missing_or_of_other_items_are_refused(tmp_path: Path):
    artifacts = write_circle(tmp_path)
    with pytest.raises(InputError, match="llamarec train-retriever --titles model"):
        train_retriever(BRIEF, artifacts)
    with new_artifact(artifacts / KIND, KIND, options={}, inputs={}) as partial:
        save_vectors(partial, np.ones((5, 3), np.float32))
    with pytest.raises(InputError, match="vectors of 4 titles, and the catalogue has 30 items"):
        load_vectors(artifacts / KIND, ITEMS)
