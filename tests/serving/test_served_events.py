"""Events and histories on the real tritonserver, with a store in a file and in Redis."""

import asyncio
import os
import signal
import time
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from llamarec_client.contract import ENSEMBLE, RETRIEVAL_ENSEMBLE
from llamarec_client.errors import InvalidRequest, ServerUnavailable
from llamarec_client.messages import Request
from llamarec_client.recommender import AsyncRecommenderClient, Recommendation, RecommenderClient
from preprocessing.data import load_data
from serving.offline import ExportedSteps
from serving.server.local import LocalServer
from stores.address import open_store
from stores.loading import load_events

NOW = 1_732_791_600_000


@pytest.fixture(scope="module")
def store_file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("store") / "histories.sqlite"


@pytest.fixture(scope="module")
def url(repository, artifacts, store_file):
    """Yield the address of a server whose store has the interactions of MovieLens-100K."""
    address = f"sqlite:///{store_file}"
    load_events(artifacts, address)
    with ExitStack() as opened:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LLAMAREC_STORE", address)  # of this server only, which reads it when it starts
            server = opened.enter_context(LocalServer(repository))
        yield server.url


@pytest.fixture(scope="module")
def client(url):
    with RecommenderClient(url) as client:
        yield client


@pytest.fixture(scope="module")
def plain(server):
    """Yield a client of a server without a store."""
    with RecommenderClient(server.url) as client:
        yield client


def test_answers_by_user_are_those_by_history(client, artifacts, repository, store_file):
    """For every user of the data set from the retriever, for some from the ranker, bit for bit; and as offline."""
    users = load_data(artifacts).users
    with closing(open_store(f"sqlite:///{store_file}")) as store:
        histories = {user: [event.item.decode() for event in store.last(user.encode())] for user in users}
        steps = ExportedSteps.load(repository, store=store)
        for model, asked in ((RETRIEVAL_ENSEMBLE, users), (ENSEMBLE, users[::50])):
            by_user = client.recommend_many([Request(user_id=user) for user in asked], model=model, timeout=300)
            by_history = client.recommend_many([Request(histories[user]) for user in asked], model=model, timeout=300)
            assert by_user == by_history
            assert all(len(answer) == 20 for answer in by_user)
        for user, answer in zip(users[:100:50], by_user, strict=False):
            assert answer == [Recommendation(*row) for row in steps.recommend(user_id=user)]


def test_what_is_recorded_is_in_the_next_answer(client):
    """Both ensembles answer as to the same history; late events find their place."""
    assert client.recommend(user_id="new one") == client.recommend([])
    assert client.record("new one", ["181"], timestamps=[NOW]) == 1
    assert client.recommend(user_id="new one") == client.recommend(["181"])
    assert client.record("new one", ["50", "never seen"], timestamps=[NOW - 2, NOW - 1], kinds=["buy", "view"]) == 2
    for model in (ENSEMBLE, RETRIEVAL_ENSEMBLE):
        answer = client.recommend(user_id="new one", model=model)
        assert answer == client.recommend(["50", "never seen", "181"], model=model)
    assert client.recommend(["172"], user_id="new one") == client.recommend(["172"])
    assert client.recommend([], user_id="new one") == client.recommend([])


def test_events_without_times_keep_the_order_of_their_call(client):
    """The client gives one millisecond to each."""
    assert client.record("in order", ["50", "181", "172"]) == 3
    assert client.recommend(user_id="in order") == client.recommend(["50", "181", "172"])


def test_the_same_events_again_are_not_new(client):
    items = [str(item) for item in range(10_000)]
    times = list(range(NOW, NOW + 10_000))
    assert client.record("repeated", items, timestamps=times) == 1000  # as many are kept
    assert client.record("repeated", items, timestamps=times) == 0
    assert client.record("repeated", []) == 0


def test_asyncio_records_and_recommends(url):
    """Sixteen tasks at once, some of whose events share a commit; one of them is refused and spoils no other."""

    async def run():
        async with AsyncRecommenderClient(url) as client:
            calls = [client.record(f"task {number}", ["50"], timestamps=[number - 1]) for number in range(16)]
            counts = await asyncio.gather(*calls, return_exceptions=True)
            return counts, await client.recommend(user_id="task 7"), await client.recommend(["50"])

    counts, answer, expected = asyncio.run(run())
    assert isinstance(counts[0], InvalidRequest)
    assert counts[1:] == [1] * 15
    assert answer == expected


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"user_id": "", "item_ids": ["50"]}, "USER_ID"),
        ({"user_id": "ann", "item_ids": "50"}, "ITEM_ID is one string"),
        ({"user_id": "ann", "item_ids": ["x" * 513]}, r"events: ITEM_ID\[0\]"),
        ({"user_id": "ann", "item_ids": ["50"], "timestamps": [-1]}, r"events: TIMESTAMP\[0\] is -1, before 1970"),
        ({"user_id": "ann", "item_ids": ["50"], "timestamps": [2**47]}, r"TIMESTAMP\[0\] .* ahead of the server's"),
        ({"user_id": "ann", "item_ids": ["50"], "timestamps": ["now"]}, "TIMESTAMP is .*whole numbers, milliseconds"),
        ({"user_id": "ann", "item_ids": ["50"], "timestamps": [1, 2]}, "TIMESTAMP holds 2 values for 1 items"),
        ({"user_id": "ann", "item_ids": ["50"], "kinds": []}, "KIND holds 0 values for 1 items"),
        ({"user_id": "ann", "item_ids": ["50"] * 10_001}, "ITEM_ID holds 10,001 ids"),
    ],
)
def test_bad_events_are_refused_by_name(client, arguments, named):
    with pytest.raises(InvalidRequest, match=named):
        client.record(**arguments)


def test_without_a_store_all_is_as_before(plain, client):
    """A user id only serves logs; without a history, the error says what to do; events are refused."""
    assert plain.recommend(["50"], user_id="1") == client.recommend(["50"])
    with pytest.raises(InvalidRequest, match="no store to find USER_ID in: send HISTORY, or start the server with"):
        plain.recommend(user_id="1")
    with pytest.raises(ServerUnavailable, match=r"events: the store of histories is not named: .* serve --store URL"):
        plain.record("1", ["50"])


def test_neither_history_nor_user_is_refused_by_server_and_client(url, client):
    with pytest.raises(InvalidRequest, match="HISTORY is None, and so is USER_ID: give a list"):
        client.recommend(top_k=3)
    top_k = grpc.InferInput("TOP_K", [1, 1], "INT32")
    top_k.set_data_from_numpy(np.array([[3]], dtype="int32"))
    with (
        grpc.InferenceServerClient(url) as raw,
        pytest.raises(InferenceServerException, match="neither HISTORY nor USER_ID") as refused,
    ):
        raw.infer(ENSEMBLE, [top_k])
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_a_store_that_is_away_is_named_and_back_by_itself(client, store_file):
    """The file is moved and put back while the server runs; histories of requests need no store."""
    before = client.recommend(user_id="1")
    away = store_file.with_suffix(".away")
    store_file.rename(away)
    try:
        for call in (lambda: client.recommend(user_id="1"), lambda: client.record("1", ["50"])):
            with pytest.raises(ServerUnavailable, match=r"the store sqlite:///.*histories\.sqlite is gone"):
                call()
        assert client.recommend(["50"], user_id="1")
    finally:
        away.rename(store_file)
    assert client.recommend(user_id="1") == before


@pytest.mark.redis
@pytest.mark.thorough
def test_two_servers_on_one_redis(repository, redis_server, monkeypatch):
    """What one server acknowledged is in the next answer of the other. Redis is killed: look-ups fail within 100 ms,
    requests with a history go on; it is started again, and nothing is lost.
    """
    monkeypatch.setenv("LLAMAREC_STORE", redis_server.url)
    with (
        LocalServer(repository) as first,
        LocalServer(repository) as second,
        RecommenderClient(first.url) as writer,
        RecommenderClient(second.url) as reader,
    ):
        for place, item in enumerate(["50", "181", "172"]):
            assert writer.record("ann", [item], timestamps=[NOW + place]) == 1
            history = ["50", "181", "172"][: place + 1]
            assert reader.recommend(user_id="ann") == writer.recommend(history)
        redis_server.kill()
        with grpc.InferenceServerClient(second.url) as raw:
            user = grpc.InferInput("USER_ID", [1, 1], "BYTES")
            user.set_data_from_numpy(np.array([[b"ann"]], dtype=object))
            raw.is_server_live()
            began = time.monotonic()
            with pytest.raises(InferenceServerException, match=f"127.0.0.1:{redis_server.port}") as refused:
                raw.infer(RETRIEVAL_ENSEMBLE, [user])
            seconds = time.monotonic() - began
        assert refused.value.status() == "StatusCode.UNAVAILABLE"
        assert seconds < 0.1 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
        with pytest.raises(ServerUnavailable, match="the store redis://"):
            writer.record("ann", ["7"])
        assert reader.recommend(["50"], user_id="ann") == writer.recommend(["50"])
        redis_server.start()
        time.sleep(0.3)
        assert reader.recommend(user_id="ann") == writer.recommend(["50", "181", "172"])
        assert writer.record("ann", ["100"], timestamps=[NOW + 9]) == 1
        assert reader.recommend(user_id="ann") == writer.recommend(["50", "181", "172", "100"])


def test_acknowledged_events_survive_the_server(repository, tmp_path, monkeypatch):
    """The server and its steps are killed (SIGKILL) right after an acknowledgement."""
    monkeypatch.setenv("LLAMAREC_STORE", f"sqlite:///{tmp_path}/store")
    with LocalServer(repository) as server, RecommenderClient(server.url) as client:
        for number in range(20):
            assert client.record("ann", [str(number)], timestamps=[number]) == 1
        os.killpg(server.pid, signal.SIGKILL)
    with closing(open_store(f"sqlite:///{tmp_path}/store")) as store:
        assert [event.time for event in store.last(b"ann")] == list(range(20))
