"""Which history a request is answered from."""

from contextlib import closing

import numpy as np
import pytest

from llamarec_client.contract import HISTORY, USER_ID
from preprocessing.catalogue import Catalogue
from preprocessing.errors import InputError
from preprocessing.features import FeatureEncoder
from serving.contract import HISTORY_ITEM
from serving.histories import requested_history
from serving.layout import store_address
from serving.steps.features import FeaturesStep
from stores.sqlite import SqliteStore
from stores.store import Event, StoreError


@pytest.fixture
def store(tmp_path):
    with closing(SqliteStore(tmp_path / "store")) as store:
        store.record([(b"ann", [Event(b"181", 2), Event(b"50", 1), Event(b"new", 3)])])
        yield store


@pytest.mark.parametrize(
    ("history", "user", "expected"),
    [
        (None, b"ann", [b"50", b"181", b"new"]),
        (None, b"nobody", []),
        ([], b"ann", []),
        ([b"172"], b"ann", [b"172"]),
        ([b"172"], None, [b"172"]),
        ([b"172"], b"", [b"172"]),
    ],
)
def test_a_history_that_is_given_counts(store, history, user, expected):
    """Even if it is empty; without one, the user's events in the order of time, and nothing for an unknown user."""
    assert requested_history(history, user, store) == expected


def test_neither_history_nor_user_is_refused(store):
    for kept in (store, None):
        with pytest.raises(InputError, match="neither HISTORY nor USER_ID is given: send HISTORY, which may be empty"):
            requested_history(None, None, kept)


def test_a_user_without_a_store_is_refused_with_the_remedy():
    with pytest.raises(InputError, match="no store to find USER_ID in: send HISTORY, or start the server with"):
        requested_history(None, b"ann", None)


@pytest.mark.parametrize("user", [b"", b"u" * 513, b"\xff"])
def test_a_user_id_that_cannot_be_one_is_refused(store, user):
    with pytest.raises(InputError, match=f"USER_ID has {len(user)} bytes: give 1 to 512"):
        requested_history(None, user, store)


def test_items_are_used_once_they_are_known(store):
    """A catalogue knows two of the three events; when it knows the third, nothing has to be recorded again. The
    facts count the looked-up history: it is what the request is answered from.
    """
    asked = {USER_ID: np.array([b"ann"], dtype=object)}
    for ids, items, unknown in (([b"181", b"50"], [2, 1], 1), ([b"181", b"50", b"new"], [2, 1, 3], 0)):
        step = FeaturesStep.of(FeatureEncoder(Catalogue(ids, ids, [1] * len(ids))), store)
        answer = step.answer(asked)
        assert answer[HISTORY_ITEM].tolist() == items
        assert step.facts(asked, answer, {}) == {"user": "ann", "history": 3, "unknown_items": unknown}


def test_a_store_that_is_down_concerns_nobody_with_a_history(tmp_path):
    """Except for a step that has never reached the store: it does not know which items are hidden."""
    (tmp_path / "folder").mkdir()
    store = SqliteStore(tmp_path / "folder" / "store")
    step = FeaturesStep.of(FeatureEncoder(Catalogue([b"50"], ["A"], [1])), store)
    user = {USER_ID: np.array([b"ann"], dtype=object)}
    given = {**user, HISTORY: np.array([b"50"], dtype=object)}
    (tmp_path / "folder").rename(tmp_path / "away")
    for request in (user, given):
        with pytest.raises(StoreError, match="folder/store"):
            step.answer(request)
    (tmp_path / "away").rename(tmp_path / "folder")
    assert step.answer(given)[HISTORY_ITEM].tolist() == [1]
    (tmp_path / "folder").rename(tmp_path / "away")
    with pytest.raises(StoreError, match="folder/store"):
        step.answer(user)
    assert step.answer(given)[HISTORY_ITEM].tolist() == [1]


def test_the_environment_takes_the_place_of_the_parameter(monkeypatch):
    """The model's configuration, as Triton hands it over, and the variable of `llamarec serve --store`."""
    named = {"model_config": '{"parameters": {"STORE": {"string_value": "sqlite:///a"}}}'}
    monkeypatch.delenv("LLAMAREC_STORE", raising=False)
    assert store_address({"model_config": "{}"}) is None
    assert store_address(named) == "sqlite:///a"
    monkeypatch.setenv("LLAMAREC_STORE", "redis://b")
    assert store_address(named) == "redis://b"
