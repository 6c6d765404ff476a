"""What the client sends when it records events, and that an attempt sent again is the same."""

import asyncio
import time
from concurrent import futures

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from llamarec_client.errors import ServerUnavailable
from llamarec_client.recommender import AsyncRecommenderClient, RecommenderClient


class Events(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Stands in for the model: keeps all requests, refuses the first ones, and answers 2 to the others."""

    def __init__(self) -> None:
        self.asked: list[service_pb2.ModelInferRequest] = []
        self.refusals = 0
        self.message = "events: the store redis://127.0.0.1:6379/0 cannot be used (Connection refused): start Redis"

    def ModelInfer(self, request, context):  # noqa: N802 - the protocol's name
        self.asked.append(request)
        if len(self.asked) <= self.refusals:
            context.abort(grpc.StatusCode.UNAVAILABLE, self.message)
        output = {"name": "NEW", "datatype": "INT32", "shape": [1, 1]}
        return service_pb2.ModelInferResponse(outputs=[output], raw_output_contents=[np.int32(2).tobytes()])

    def tensors(self, place: int) -> dict[str, tuple[list[int], bytes]]:
        """Return shape and content of each input of a request."""
        asked = self.asked[place]
        return {
            tensor.name: (list(tensor.shape), content)
            for tensor, content in zip(asked.inputs, asked.raw_input_contents, strict=True)
        }


@pytest.fixture
def events():
    """Yield the model and the address of its server."""
    model, server = Events(), grpc.server(futures.ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(model, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield model, f"127.0.0.1:{port}"
    server.stop(0).wait()


def test_each_argument_becomes_its_tensor(events):
    """KServe's form by hand: each string after its length in four bytes, numbers in eight, little-endian."""
    model, url = events
    with RecommenderClient(url) as client:
        assert client.record("ann", ["50", "7"], timestamps=[1, 256], kinds=["view", "buy"]) == 2
    assert model.asked[0].model_name == "events"
    assert model.tensors(0) == {
        "USER_ID": ([1, 1], b"\3\0\0\0ann"),
        "ITEM_ID": ([1, 2], b"\2\0\0\x0050\1\0\0\x007"),
        "TIMESTAMP": ([1, 2], bytes([1, *[0] * 7, 0, 1, *[0] * 6])),
        "KIND": ([1, 2], b"\4\0\0\0view\3\0\0\0buy"),
    }


def test_without_times_the_last_milliseconds_are_sent(events):
    """One for each item, in their order, the last one of now; a kind is sent only if there is one."""
    model, url = events
    before = time.time_ns() // 1_000_000
    with RecommenderClient(url) as client:
        client.record("ann", ["50", "7", "1"])
    after = time.time_ns() // 1_000_000
    tensors = model.tensors(0)
    times = np.frombuffer(tensors["TIMESTAMP"][1], np.int64)
    assert before <= times[-1] <= after
    assert np.diff(times).tolist() == [1, 1]
    assert "KIND" not in tensors


@pytest.mark.parametrize("kind", ["plain", "asyncio"])
def test_an_attempt_that_is_sent_again_has_the_same_times(events, kind):
    """The server refuses two attempts; all three are equal to the byte, so that nothing can be counted twice."""
    model, url = events
    model.refusals = 2

    async def record():
        async with AsyncRecommenderClient(url) as client:
            return await client.record("ann", ["50", "7"])

    if kind == "asyncio":
        assert asyncio.run(record()) == 2
    else:
        with RecommenderClient(url) as client:
            assert client.record("ann", ["50", "7"]) == 2
    assert len(model.asked) == 3
    assert model.tensors(0) == model.tensors(1) == model.tensors(2)


def test_a_store_that_is_down_is_no_missing_server(events):
    """The sentence of the server is passed on, and not replaced by the advice to start a server."""
    model, url = events
    model.refusals = 9
    with RecommenderClient(url) as client, pytest.raises(ServerUnavailable) as raised:
        client.record("ann", ["50"])
    assert str(raised.value) == f"events at {url} cannot look up or record events: {model.message}"
