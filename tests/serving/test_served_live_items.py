"""Items that are added and hidden while the real tritonserver runs."""

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from llamarec_client.contract import ENSEMBLE, RETRIEVAL_ENSEMBLE
from llamarec_client.errors import InvalidRequest
from llamarec_client.recommender import Recommendation, RecommenderClient
from serving.offline import ExportedSteps
from serving.server.local import LocalServer
from stores.address import open_store
from stores.store import AddedItem, Store

pytestmark = pytest.mark.thorough
NEW = AddedItem(b"star-wars-again", "Star Wars (1977)")
"""An added item with the title of MovieLens' item 50."""
SECONDS = 1.0
"""Time in seconds within which all steps of a server know a change."""


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'store'}"


@pytest.fixture
def store(address: str) -> Iterator[Store]:
    with closing(open_store(address, dataset="movielens-100k")) as store:
        yield store


@pytest.fixture
def serve(address: str, monkeypatch: pytest.MonkeyPatch):
    """Return a function that starts a server with the store."""
    monkeypatch.setenv("LLAMAREC_STORE", address)
    return LocalServer


def test_added_and_hidden_items_are_served(titled_repository, serve, store):
    """Within a second an added item is retrieved, ranked and known in histories, and a hidden one is gone; bit for bit
    as offline, and after a restart.
    """
    exported = ExportedSteps.load(titled_repository)
    history = ["172", "181", "174", "210"]
    # All but ten items, so that the added one is among the best 20 whatever the retriever thinks of it.
    kept = range(1000, 1010)
    numbers = (number for number in range(1, len(exported.catalogue) + 1) if number not in kept)
    most = [exported.catalogue.raw(number).decode() for number in numbers]
    assert not {*history, "50"} - set(most)

    def check(client: RecommenderClient) -> None:
        steps = exported.with_items(store.listing())
        for asked in (history, [*history, NEW.item.decode()], []):
            expected = [Recommendation(*row) for row in steps.recommend(asked)]
            assert client.recommend(asked, model=ENSEMBLE) == expected
        for model in (ENSEMBLE, RETRIEVAL_ENSEMBLE):
            retrieved = client.recommend(history, exclude=most, model=model)
            (rank,) = (row.retriever_rank for row in retrieved if row.item_id == NEW.item.decode())
            assert 1 <= rank <= len(retrieved) == 11
            taken = client.recommend([*history, NEW.item.decode()], exclude=most, model=model)
            assert sorted(names(taken)) == sorted(set(names(retrieved)) - {NEW.item.decode()})
        assert "50" not in names(client.recommend(["172"], candidates=["50", NEW.item.decode()]))

    with serve(titled_repository) as server, RecommenderClient(server.url) as client:
        assert client.recommend(history) == [Recommendation(*row) for row in exported.recommend(history)]
        with pytest.raises(InvalidRequest, match="not in the catalogue"):
            client.recommend(history, candidates=[NEW.item.decode()])
        assert store.add_items([NEW]) == 1
        assert store.hide([b"50"]) == 1
        time.sleep(SECONDS)
        check(client)
    with serve(titled_repository) as server, RecommenderClient(server.url) as client:
        check(client)
        assert store.show([b"50"]) == 1
        assert store.hide([NEW.item]) == 1
        time.sleep(SECONDS)
        assert client.recommend(history) == [
            Recommendation(*row) for row in exported.with_items(store.listing()).recommend(history)
        ]
        assert names(client.recommend(history, candidates=[NEW.item.decode(), "50"])) == ["50"]


def test_without_a_text_arm_an_added_item_is_a_candidate_only(repository, serve, store):
    """The retriever of the tests' repository retrieves trained items: it gives the added item no rank."""
    store.add_items([NEW])
    with serve(repository) as server, RecommenderClient(server.url) as client:
        answer = client.recommend(["172", NEW.item.decode()], candidates=[NEW.item.decode(), "181"])
        assert {row.item_id: row.retriever_rank for row in answer} == {NEW.item.decode(): 0, "181": 1}
        assert client.recommend(["172", NEW.item.decode()]) == client.recommend(["172"])


def names(answer: list[Recommendation]) -> list[str]:
    return [row.item_id for row in answer]
