"""A training that goes on from an earlier retriever has its weights, by raw id, and titles for the new items."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_up_data import COLOURED, ITEMS, USERS, write_circle, write_data

from models.retriever.options import ARCHITECTURES, RetrieverTraining
from models.retriever.trained import TrainedRetriever
from models.retriever.training import train_retriever
from preprocessing.catalogue import ITEMS_FILE
from preprocessing.errors import InputError

BRIEF = RetrieverTraining(width=8, blocks=1, max_length=10, epochs=2, validate_every=5, batch_size=16)
NEW = ("Pink Fox", "Red Yak")


def grown(folder: Path) -> Path:
    """Write the circle's data with two more items in the sequences; their numbers come first, and move the others."""
    titles = [*NEW, *COLOURED]
    walks = [[1 + user % 2, *(3 + (user + step) % ITEMS for step in range(12))] for user in range(USERS)]
    return write_data(
        folder, walks, titles, len(titles), ["new1", "new2", *(f"i{item}" for item in range(1, ITEMS + 1))]
    )


@pytest.mark.parametrize("titles", ["none", "words"])
@pytest.mark.parametrize(
    "model", [pytest.param(name, marks=pytest.mark.thorough) if name != "lrurec" else name for name in ARCHITECTURES]
)
def test_known_items_keep_their_scores(model: str, titles: str, tmp_path: Path, monkeypatch):
    """Before its first step, the training scores the known items as the earlier retriever does."""
    options = replace(BRIEF, model=model, titles=titles)
    circle = write_circle(tmp_path / "circle")
    train_retriever(options, circle)
    more = grown(tmp_path / "grown")
    before = TrainedRetriever.load(circle / "retriever").models[0]
    # No validation is better than the one before the first step, whose weights are kept.
    monkeypatch.setattr("models.retriever.fitting.loop.recall", lambda ranks, k: 0.0)
    train_retriever(replace(options, patience=1, epochs=1, validate_every=1), more, start=circle / "retriever")
    after = TrainedRetriever.load(more / "retriever").models[0]
    history = np.array([3, 4, 5], np.int32)
    (old,), (new,) = before.scores([history]), after.scores([history + 2])
    np.testing.assert_allclose(new[3:], old[1:], atol=1e-4)
    if titles == "words":
        # A new item's score comes from its title: that of "Red Yak" only from its word "red".
        assert np.isfinite(new[1:3]).all()


def test_it_knows_the_items_before_its_first_step(tmp_path: Path):
    """The earlier weights predict the circle (Recall@10 near 1); a random order hits half of them."""
    options = replace(BRIEF, titles="words", epochs=30, learning_rate=1e-2, dropout=0.0)
    circle = write_circle(tmp_path / "circle")
    train_retriever(options, circle)
    more = grown(tmp_path / "grown")
    brief = replace(options, epochs=1)
    _, _, fresh = train_retriever(brief, more)["curve"][0]
    _, _, went_on = train_retriever(brief, more, start=circle / "retriever")["curve"][0]
    assert went_on > 0.9 > fresh + 0.2


def test_the_artifact_may_be_replaced_by_what_goes_on_from_it(tmp_path: Path):
    circle = write_circle(tmp_path)
    first = train_retriever(BRIEF, circle)
    second = train_retriever(BRIEF, circle, start=circle / "retriever")
    assert second["curve"][0][2] == first["best_validation_Recall@10"]


@pytest.mark.parametrize(
    ("changed", "error"), [({"width": 16}, "width 8, not 16"), ({"model": "narm"}, "model lrurec")]
)
def test_another_architecture_is_refused(tmp_path: Path, changed, error):
    circle = write_circle(tmp_path)
    train_retriever(BRIEF, circle)
    with pytest.raises(InputError, match=f"{error}.*train without --from"):
        train_retriever(replace(BRIEF, **changed), circle, start=circle / "retriever")


def test_an_artifact_that_does_not_record_its_items_is_refused(tmp_path: Path):
    circle = write_circle(tmp_path)
    train_retriever(BRIEF, circle)
    manifest = circle / "retriever" / "manifest.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))
    del content["files"][ITEMS_FILE]
    manifest.write_text(json.dumps(content), encoding="utf-8")
    (circle / "retriever" / ITEMS_FILE).unlink()
    with pytest.raises(InputError, match="an earlier version made it"):
        train_retriever(BRIEF, circle, start=circle / "retriever")
