"""What the client sends when it asks for similar items, what it returns, and what it refuses."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from llamarec_client import AsyncRecommenderClient, InvalidRequest, RecommenderClient, ServerError, SimilarItem
from llamarec_client.errors import ServerUnavailable


def texts(*values: bytes) -> bytes:
    """KServe's form by hand: each string after its length in four bytes, little-endian."""
    return b"".join(len(value).to_bytes(4, "little") + value for value in values)


class Similar(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Stands in for the model: keeps all requests, refuses the first ones, and answers two items to the others."""

    def __init__(self) -> None:
        self.asked: list[service_pb2.ModelInferRequest] = []
        self.refusals = 0
        self.code, self.message = grpc.StatusCode.INVALID_ARGUMENT, "neighbours: ITEM is 'x', which is not there"
        self.output = "TITLES"
        self.timeouts: list[float] = []

    def ModelInfer(self, request, context):  # noqa: N802 - the protocol's name
        self.asked.append(request)
        self.timeouts.append(context.time_remaining())
        if len(self.asked) <= self.refusals:
            context.abort(self.code, self.message)
        columns = {"SCORE": [2.5, 0.5], "TRANSITIONS": [2.0, 0.0], self.output: [0.5, 0.25]}
        outputs = [{"name": "ITEM_ID", "datatype": "BYTES", "shape": [1, 2]}]
        outputs += [{"name": name, "datatype": "FP32", "shape": [1, 2]} for name in columns]
        contents = [texts(b"181", "Ö".encode()), *(np.array(row, np.float32).tobytes() for row in columns.values())]
        return service_pb2.ModelInferResponse(outputs=outputs, raw_output_contents=contents)


@pytest.fixture
def similar() -> Iterator[tuple[Similar, str]]:
    """Yield the model and the address of its server."""
    model, server = Similar(), grpc.server(futures.ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(model, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield model, f"127.0.0.1:{port}"
    server.stop(0).wait()


@pytest.fixture(params=["plain", "asyncio"])
def call(request, similar) -> Callable[..., list[SimilarItem]]:
    """Ask a new client of either kind."""
    _, url = similar

    def plain(*given: Any, **options: Any) -> list[SimilarItem]:
        with RecommenderClient(url) as client:
            return client.similar(*given, **options)

    async def in_loop(*given: Any, **options: Any) -> list[SimilarItem]:
        async with AsyncRecommenderClient(url) as client:
            return await client.similar(*given, **options)

    return plain if request.param == "plain" else lambda *given, **options: asyncio.run(in_loop(*given, **options))


def test_an_item_becomes_its_tensors_and_the_answer_its_rows(similar, call):
    model, _ = similar
    assert call("50", 2, request_id="a") == [SimilarItem("181", 2.5, 2.0, 0.5), SimilarItem("Ö", 0.5, 0.0, 0.25)]
    (asked,) = model.asked
    assert (asked.model_name, asked.id) == ("similar", "a")
    tensors = {
        tensor.name: (list(tensor.shape), content)
        for tensor, content in zip(asked.inputs, asked.raw_input_contents, strict=True)
    }
    assert tensors == {"ITEM": ([1, 1], texts(b"50")), "TOP_K": ([1, 1], b"\2\0\0\0")}
    assert [output.name for output in asked.outputs] == ["ITEM_ID", "SCORE", "TRANSITIONS", "TITLES"]


def test_by_default_ten_items_are_asked_for_within_thirty_seconds(similar, call):
    model, _ = similar
    call("50")
    call("50", timeout=None, model="similar_canary")
    assert [asked.raw_input_contents[1] for asked in model.asked] == [b"\x0a\0\0\0"] * 2
    # The machine may be busy, and gRPC rounds the time that it sends up, by up to a hundredth.
    assert all(15 < left < 31 for left in model.timeouts), model.timeouts
    assert model.asked[1].model_name == "similar_canary"


@pytest.mark.parametrize(
    ("given", "options", "named"),
    [
        (("",), {}, "item_id is ''"),
        ((50,), {}, "item_id is 50"),
        ((["50"],), {}, r"item_id is \['50'\]"),
        (("\udce9",), {}, "item_id is"),
        (("50", 0), {}, "TOP_K is 0: give a whole number from 1 to 1000"),
        (("50", 1001), {}, "TOP_K is 1001"),
        (("50", 2.5), {}, "TOP_K is 2.5"),
        (("50",), {"timeout": 0}, "timeout is 0"),
        (("50",), {"model": ""}, "model is ''"),
    ],
)
def test_an_argument_that_cannot_be_sent_is_named_and_nothing_is_sent(similar, call, given, options, named):
    model, _ = similar
    with pytest.raises(InvalidRequest, match=named):
        call(*given, **options)
    assert model.asked == []


def test_an_unknown_item_is_refused_with_the_servers_sentence(similar, call):
    model, _ = similar
    model.refusals = 9
    with pytest.raises(InvalidRequest) as raised:
        call("x")
    assert str(raised.value) == model.message
    assert len(model.asked) == 1


def test_a_server_that_is_unavailable_is_asked_again(similar, call):
    model, _ = similar
    model.refusals, model.code, model.message = 2, grpc.StatusCode.UNAVAILABLE, "Socket closed"
    assert len(call("50")) == 2
    assert len(model.asked) == 3


def test_a_server_of_an_earlier_version_has_no_such_model(similar, call):
    """Triton's own message for a model that it does not have."""
    model, _ = similar
    model.refusals, model.code = 9, grpc.StatusCode.UNAVAILABLE
    model.message = "Request for unknown model: 'similar' is not found"
    with pytest.raises(ServerUnavailable, match="does not serve similar: run `llamarec export`"):
        call("50")


def test_an_answer_of_something_else_is_a_failure_of_the_server(similar, call):
    model, _ = similar
    model.output = "NEW"
    with pytest.raises(ServerError, match="the answer of similar does not follow the contract"):
        call("50")
