"""Similar items on the real tritonserver: as offline, with the store's items, and of the release that is served."""

import time
from contextlib import closing
from dataclasses import astuple
from pathlib import Path

import pytest

from llamarec_client.errors import InvalidRequest
from llamarec_client.recommender import RecommenderClient
from serving.layout import step_artifact
from serving.server.local import LocalServer
from serving.similar import SimilarItems
from stores.address import open_store
from stores.store import AddedItem


def offline(similar: SimilarItems, item: str, top_k: int = 10) -> list[tuple]:
    """Return what the server answers in FP32."""
    rows = similar(item.encode(), top_k)
    return [(row.item.decode(), *(pytest.approx(value, rel=1e-6) for value in row[1:])) for row in rows]


def test_the_served_items_are_those_of_the_exported_files(repository: Path, server: LocalServer):
    similar = SimilarItems.load(step_artifact(repository, "neighbours"))
    with RecommenderClient(server.url) as client:
        for item in ("50", "181", "1", "1682"):
            assert [astuple(row) for row in client.similar(item)] == offline(similar, item)
        assert len(client.similar("50", 200)) == 200
        with pytest.raises(InvalidRequest, match=r"^neighbours: ITEM is 'none', which is not in the catalogue"):
            client.similar("none")


@pytest.mark.thorough
def test_added_and_hidden_items_are_respected(titled_repository, tmp_path, monkeypatch):
    """The added item has the words of item 50's title; both change within a second."""
    address = f"sqlite:///{tmp_path / 'store'}"
    monkeypatch.setenv("LLAMAREC_STORE", address)
    with (
        closing(open_store(address, dataset="movielens-100k")) as store,
        LocalServer(titled_repository) as server,
        RecommenderClient(server.url) as client,
    ):
        before = client.similar("181", 1000)
        first = before[0].item_id
        with pytest.raises(InvalidRequest):
            client.similar("star-wars-again")
        store.add_items([AddedItem(b"star-wars-again", "Star Wars (1977)")])
        store.hide([first.encode()])
        time.sleep(1)
        assert first not in {row.item_id for row in client.similar("181", 1000)}
        (found,) = (row for row in client.similar("50", 1000) if row.item_id == "star-wars-again")
        assert (found.titles, found.transitions) == (pytest.approx(1), 0)
        (back,) = (row for row in client.similar("star-wars-again", 1000) if row.item_id == "50")
        assert back.titles == pytest.approx(1)
        similar = SimilarItems.load(step_artifact(titled_repository, "neighbours")).with_items(store.listing())
        assert [astuple(row) for row in client.similar("star-wars-again", 5)] == offline(similar, "star-wars-again", 5)
