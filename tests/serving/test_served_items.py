"""Items on the real tritonserver: added, hidden and shown with the admin key, in a store that is a file."""

import asyncio
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from llamarec_client.errors import ClientError, InvalidRequest, ServerUnavailable
from llamarec_client.recommender import AsyncRecommenderClient, RecommenderClient
from serving.server.local import LocalServer
from stores.address import open_store
from stores.store import AddedItem

KEY = "Xq3-of-these-tests"


@pytest.fixture(scope="module")
def store_file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("store") / "items.sqlite"


@pytest.fixture(scope="module")
def server(echo_repository, store_file):
    """Yield a server with a store and an admin key, whose every request is logged."""
    with ExitStack() as opened:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LLAMAREC_STORE", f"sqlite:///{store_file}")  # of this server only, when it starts
            patch.setenv("LLAMAREC_ADMIN_KEY", KEY)
            patch.setenv("LLAMAREC_REQUEST_LOG", "1")
            running = opened.enter_context(LocalServer(echo_repository))
        yield running


@pytest.fixture(scope="module")
def client(server):
    with RecommenderClient(server.url) as client:
        yield client


def listing(store_file: Path):
    with closing(open_store(f"sqlite:///{store_file}")) as store:
        return store.listing()


def test_items_are_added_hidden_and_shown(client, store_file):
    """Each call is counted once; what it changed is in the store when it returns."""
    titles = {"n1": "A new item", "n2": "Ein grünes Ding"}
    assert client.add_items(titles, key=KEY) == 2
    assert client.add_items(titles, key=KEY) == 0
    assert client.add_items({"n1": "A new title"}, key=KEY) == 1
    assert client.hide_items(["n1", "50"], key=KEY) == 2
    assert client.hide_items(["n1", "50"], key=KEY) == 0
    assert client.show_items(["n1", "181"], key=KEY) == 1
    assert client.show_items([], key=KEY) == 0
    kept = listing(store_file)
    assert set(kept.added) == {AddedItem(b"n1", "A new title"), AddedItem(b"n2", "Ein grünes Ding")}
    assert kept.hidden == {b"50"}


def test_the_largest_request_is_carried_out(client, store_file):
    """10,000 items, each with an id of 512 bytes and a title of as many: 10 MB."""
    titles = {f"{place:0512}": f"{place:0512}" for place in range(10_000)}
    assert client.add_items(titles, key=KEY, timeout=120) == 10_000
    assert len(listing(store_file).added) >= 10_000


@pytest.mark.parametrize("method", ["add_items", "hide_items", "show_items"])
def test_a_wrong_key_changes_nothing(client, store_file, method):
    before = listing(store_file)
    with pytest.raises(InvalidRequest, match="items: KEY is not the admin key of this server"):
        getattr(client, method)({"n9": "Title"}, key="wrong")
    assert listing(store_file) == before


@pytest.mark.parametrize(
    ("method", "given", "named"),
    [
        ("add_items", {"n1": ""}, r"items: TITLE\[0\] has 0 bytes"),
        ("add_items", {"n1": "Title", "n2": " "}, r"items: TITLE\[1\] is blank"),
        ("add_items", {"": "Title"}, r"items: ITEM_ID\[0\] has 0 bytes"),
        ("hide_items", ["50", "x" * 513], r"items: ITEM_ID\[1\] has 513 bytes"),
        ("show_items", ["50"] * 10_001, "items: ITEM_ID holds 10,001 ids"),
    ],
)
def test_bad_items_are_refused_by_name(client, method, given, named):
    with pytest.raises(InvalidRequest, match=named):
        getattr(client, method)(given, key=KEY)


def test_requests_at_once_are_each_counted(server):
    """Sixteen tasks, whose requests Triton hands over together: with titles and without, and one with a wrong key."""

    async def run():
        async with AsyncRecommenderClient(server.url) as client:
            calls = [client.hide_items([f"task {number}"], key=KEY if number else "wrong") for number in range(16)]
            calls += [client.add_items({f"task {number}": "Title"}, key=KEY) for number in range(16)]
            return await asyncio.gather(*calls, return_exceptions=True)

    refused, *counts = asyncio.run(run())
    assert isinstance(refused, InvalidRequest)
    assert counts == [1] * 31


def test_the_log_holds_neither_key_nor_titles(client, server):
    """Every request is logged, with its action and two numbers."""
    client.add_items({"logged": "Title of the log"}, key=KEY, request_id="logged")
    with pytest.raises(ClientError):
        client.add_items({"logged": " "}, key=KEY)
    log = server.log()
    assert '"action": "add", "items": 1, "changed": 1' in next(line for line in log.splitlines() if '"logged"' in line)
    assert KEY not in log
    assert "Title of the log" not in log


@pytest.mark.thorough
def test_without_key_or_store_changes_are_refused(echo_server, echo_repository, monkeypatch):
    """The first server has neither, the second one only a key; both name the variable that is missing."""
    with (
        RecommenderClient(echo_server.url) as client,
        pytest.raises(InvalidRequest, match=r"items: this server has no admin key.* set LLAMAREC_ADMIN_KEY"),
    ):
        client.hide_items(["50"], key=KEY)
    monkeypatch.setenv("LLAMAREC_ADMIN_KEY", KEY)
    with (
        LocalServer(echo_repository) as server,
        RecommenderClient(server.url) as client,
        pytest.raises(ServerUnavailable, match=r"items: the store of items is not named: .* serve --store URL"),
    ):
        client.hide_items(["50"], key=KEY)
