"""What the client sends when it adds, hides and shows items, and what it refuses before it sends anything."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from llamarec_client.errors import InvalidRequest, ServerError, ServerUnavailable
from llamarec_client.recommender import AsyncRecommenderClient, RecommenderClient

SECRET = "Xq3-of-these-tests"


class Items(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Stands in for the model: keeps all requests, refuses the first ones, and answers 2 to the others."""

    def __init__(self) -> None:
        self.asked: list[service_pb2.ModelInferRequest] = []
        self.refusals = 0
        self.code = grpc.StatusCode.UNAVAILABLE
        self.message = "items: the store redis://127.0.0.1:6379/0 cannot be used (Connection refused): start Redis"
        self.output = "CHANGED"

    def ModelInfer(self, request, context):  # noqa: N802 - the protocol's name
        self.asked.append(request)
        if len(self.asked) <= self.refusals:
            context.abort(self.code, self.message)
        output = {"name": self.output, "datatype": "INT32", "shape": [1, 1]}
        return service_pb2.ModelInferResponse(outputs=[output], raw_output_contents=[np.int32(2).tobytes()])

    def tensors(self, place: int) -> dict[str, tuple[list[int], bytes]]:
        """Return shape and content of each input of a request."""
        asked = self.asked[place]
        return {
            tensor.name: (list(tensor.shape), content)
            for tensor, content in zip(asked.inputs, asked.raw_input_contents, strict=True)
        }


@pytest.fixture
def items() -> Iterator[tuple[Items, str]]:
    """Yield the model and the address of its server."""
    model, server = Items(), grpc.server(futures.ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(model, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield model, f"127.0.0.1:{port}"
    server.stop(0).wait()


@pytest.fixture(params=["plain", "asyncio"])
def call(request, items) -> Callable[..., Any]:
    """Call a method of a new client of either kind."""
    _, url = items

    def plain(method: str, *given: Any, **options: Any) -> Any:
        with RecommenderClient(url) as client:
            return getattr(client, method)(*given, **options)

    async def in_loop(method: str, *given: Any, **options: Any) -> Any:
        async with AsyncRecommenderClient(url) as client:
            return await getattr(client, method)(*given, **options)

    return plain if request.param == "plain" else lambda *given, **options: asyncio.run(in_loop(*given, **options))


def text(*values: bytes) -> tuple[list[int], bytes]:
    """KServe's form by hand: each string after its length in four bytes, little-endian."""
    return [1, len(values)], b"".join(len(value).to_bytes(4, "little") + value for value in values)


KEY = text(SECRET.encode())


def test_each_call_becomes_its_tensors(items, call):
    model, _ = items
    assert call("add_items", {"n1": "Grün", "n2": "Two"}, key=SECRET, request_id="a") == 2
    assert call("hide_items", ["50", "n1"], key=SECRET) == 2
    assert call("show_items", np.array(["50"]), key=SECRET) == 2
    assert call("hide_items", [], key=SECRET) == 2
    assert {asked.model_name for asked in model.asked} == {"items"}
    assert model.asked[0].id == "a"
    added = {"ACTION": text(b"add"), "ITEM_ID": text(b"n1", b"n2"), "TITLE": text("Grün".encode(), b"Two"), "KEY": KEY}
    assert [model.tensors(place) for place in range(4)] == [
        added,
        {"ACTION": text(b"hide"), "ITEM_ID": text(b"50", b"n1"), "KEY": KEY},
        {"ACTION": text(b"show"), "ITEM_ID": text(b"50"), "KEY": KEY},
        {"ACTION": text(b"hide"), "ITEM_ID": text(), "KEY": KEY},
    ]


@pytest.mark.parametrize(
    ("method", "given", "options", "named"),
    [
        ("add_items", ["n1"], {}, r"titles is \['n1'\]: give a dict with the title of each item id"),
        ("add_items", None, {}, "titles is None"),
        ("add_items", {"n1": None}, {}, "TITLE holds None: titles are strings of valid Unicode"),
        ("add_items", {"n1": b"One"}, {}, "TITLE holds b'One': titles are strings"),
        ("add_items", {"n1": "\udce9"}, {}, "TITLE holds"),
        ("add_items", {1: "One"}, {}, "ITEM_ID holds 1: item ids are strings"),
        ("hide_items", "50", {}, "ITEM_ID is one string: give a list of item ids"),
        ("hide_items", 50, {}, "ITEM_ID is 50: give a list of item ids"),
        ("show_items", [50], {}, "ITEM_ID holds 50: item ids are strings"),
        ("show_items", ["50"], {"timeout": 0}, "timeout is 0"),
        ("show_items", ["50"], {"request_id": 7}, "request_id is 7"),
        *(
            (method, given, {"key": key}, "key is no text, or an empty one: .*LLAMAREC_ADMIN_KEY or in .serve.json")
            for method, given in (("add_items", {"n1": "One"}), ("hide_items", ["50"]), ("show_items", ["50"]))
            for key in (None, "", b"bytes", "\udce9", 3)
        ),
    ],
)
def test_an_argument_that_cannot_be_sent_is_named_and_nothing_is_sent(items, call, method, given, options, named):
    model, _ = items
    with pytest.raises(InvalidRequest, match=named):
        call(method, given, **{"key": SECRET, **options})
    assert model.asked == []


def test_a_key_that_cannot_be_sent_is_not_shown(call):
    """An error ends in a log: it may not hold what could be the key."""
    with pytest.raises(InvalidRequest) as raised:
        call("hide_items", ["50"], key=SECRET.encode())
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("add_items", lambda: {"n1": "One"}),
        ("hide_items", lambda: {"50", "181"}),
        ("show_items", lambda: iter(["50", "181"])),
    ],
)
def test_an_attempt_that_is_sent_again_is_the_same(items, call, method, given):
    """The server refuses two attempts; all three are equal, also if the ids are a set or an iterator."""
    model, _ = items
    model.refusals = 2
    assert call(method, given(), key=SECRET) == 2
    assert len(model.asked) == 3
    assert model.tensors(0) == model.tensors(1) == model.tensors(2)


def test_a_wrong_key_is_not_tried_again(items, call):
    """The server's sentence is passed on."""
    model, _ = items
    model.refusals, model.code = 9, grpc.StatusCode.INVALID_ARGUMENT
    model.message = "items: KEY is not the admin key of this server: send the one in LLAMAREC_ADMIN_KEY"
    with pytest.raises(InvalidRequest) as raised:
        call("hide_items", ["50"], key=SECRET)
    assert str(raised.value) == model.message
    assert len(model.asked) == 1


def test_a_store_that_is_down_is_no_missing_server(items, call):
    model, url = items
    model.refusals = 9
    with pytest.raises(ServerUnavailable) as raised:
        call("show_items", ["50"], key=SECRET)
    assert str(raised.value) == f"items at {url} cannot change items: {model.message}"
    assert len(model.asked) == 3


def test_an_answer_of_something_else_is_a_failure_of_the_server(items, call):
    model, _ = items
    model.output = "NEW"
    with pytest.raises(ServerError, match="the answer of items does not follow the contract"):
        call("hide_items", ["50"], key=SECRET)
