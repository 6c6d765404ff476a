"""Recommendations for all users against the real tritonserver."""

from contextlib import closing

import pyarrow.parquet as pq
import pytest

from llamarec_client.contract import ENSEMBLE, RETRIEVAL_ENSEMBLE
from llamarec_client.messages import Request
from llamarec_client.recommender import Recommendation, RecommenderClient
from serving.batch.recommend_all import RecommendAll, recommend_all
from serving.batch.users import ArtifactUsers, StoreUsers
from serving.server.local import LocalServer
from stores.address import open_store
from stores.store import AddedItem, Event

pytestmark = pytest.mark.thorough
MODELS = {"ranking": ENSEMBLE, "retrieval": RETRIEVAL_ENSEMBLE}


def written(folder):
    """Return the answer of each user as the client returns the server's."""
    rows = [row for path in sorted(folder.glob("recommendations/*")) for row in pq.read_table(path).to_pylist()]
    columns = ("items", "scores", "retriever_ranks")
    return {
        row["user"]: [Recommendation(*item) for item in zip(*(row[name] for name in columns), strict=True)]
        for row in rows
    }


@pytest.mark.parametrize("stage", MODELS)
def test_every_user_of_a_data_set_gets_the_served_answer(artifacts, repository, server, tmp_path, stage):
    """All 943 users of MovieLens-100K, bit for bit; the server ranks many at once, and the batch one after another."""
    recommend_all(RecommendAll(stage=stage), repository, ArtifactUsers(artifacts), tmp_path / "out")
    users = list(ArtifactUsers(artifacts))
    with RecommenderClient(server.url) as client:
        requests = [Request(row.history, top_k=20) for row in users]
        served = client.recommend_many(requests, model=MODELS[stage], timeout=600, in_flight=4)
    found = written(tmp_path / "out")
    assert len(found) == 943
    assert found == {row.user: answer for row, answer in zip(users, served, strict=True)}


@pytest.mark.parametrize("stage", MODELS)
def test_every_user_of_a_store_gets_the_served_answer(titled_repository, tmp_path, monkeypatch, stage):
    """The server looks the histories up by USER_ID; the added item is in one of them, and the hidden one in no list."""
    address = f"sqlite:///{tmp_path}/store"
    monkeypatch.setenv("LLAMAREC_STORE", address)
    with closing(open_store(address, dataset="movielens-100k")) as store:
        store.record([(b"%d" % user, [Event(b"%d" % (7 * user + k), k) for k in range(1, 9)]) for user in range(30)])
        store.record([(b"new", [Event(b"star-wars-again", 1), Event(b"172", 2)])])
        store.add_items([AddedItem(b"star-wars-again", "Star Wars (1977)")])
        store.hide([b"50", b"258"])
        users = StoreUsers(store)
        recommend_all(RecommendAll(stage=stage), titled_repository, users, tmp_path / "out", listing=store.listing())
        names = [row.user for row in users]
    with LocalServer(titled_repository) as server, RecommenderClient(server.url) as client:
        requests = [Request(user_id=user, top_k=20) for user in names]
        served = client.recommend_many(requests, model=MODELS[stage], in_flight=4)
    found = written(tmp_path / "out")
    assert len(found) == 31
    assert found == dict(zip(names, served, strict=True))
    assert {item.item_id for answer in found.values() for item in answer}.isdisjoint({"50", "258"})
