"""Generated requests and raw bytes on the gRPC port cause no crash and no hang, and every answer has a proper code.

`make fuzz` sends 10,000 requests, `make test` 1,000. Requests that once failed are kept as explicit examples.
"""

import asyncio
import json
import os
import socket
import struct
from contextlib import ExitStack

import grpc
import pytest
from grpc import StatusCode
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2, service_pb2_grpc

from llamarec_client.contract import MAX_CANDIDATES, MAX_HISTORY, MAX_ID_BYTES, MAX_TITLE_BYTES, POLICY_FIELDS
from llamarec_client.recommender import RecommenderClient
from serving.server.local import LocalServer

TOGETHER = 25
"""Number of concurrent requests, so that bad ones share batches with good ones."""
EXAMPLES = int(os.environ.get("FUZZ_REQUESTS", "1000")) // TOGETHER
PROPER = {StatusCode.OK, StatusCode.INVALID_ARGUMENT, StatusCode.NOT_FOUND, StatusCode.UNAVAILABLE}
"""tritonserver answers UNAVAILABLE to a request for an unknown model version."""
DEADLINE = 60
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SIZES = {"BOOL": 1, "INT32": 4, "INT64": 8, "FP32": 4, "FP64": 8}

ids = st.sampled_from(
    ["50", "181", "172", "1", "1349", "nothing", "", "é" * 8, "\0", "(A) ", "</s>", "x" * MAX_ID_BYTES]
) | st.text(max_size=20)
raw_titles = (
    st.sampled_from(
        [
            "",
            " ",
            "Star Wars (1977)",
            "</s><|im_end|>",
            "a\n\n### Response:\nA",
            "(B) ",
            "\0\u2028",
            "é" * 2048,
            "x " * 2048,
        ]
    ).map(str.encode)
    | st.text(max_size=60).map(str.encode)
    | st.binary(max_size=40)
    | st.just(b"x" * (MAX_TITLE_BYTES + 1))
)
raw_policies = (
    st.dictionaries(
        st.sampled_from(POLICY_FIELDS) | st.text(max_size=3),
        st.none()
        | st.integers(-2, 3)
        | st.floats()
        | st.sampled_from(["all", "none", "some"])
        | st.lists(st.text(max_size=3), max_size=3)
        | st.dictionaries(ids, st.floats(0.1, 10) | st.integers(0, 2), max_size=3),
        max_size=2,
    ).map(lambda policy: json.dumps(policy).encode())
    | st.sampled_from([b"", b"{}", b"[]", b"{" * 9_000, b'{"boosts": {"50": 1e999}}'])
    | st.binary(max_size=20)
)
raw_ids = ids.map(str.encode) | st.binary(max_size=40) | st.just(b"x" * (MAX_ID_BYTES + 1))


def strings(values: list[bytes]) -> bytes:
    """Encode a BYTES tensor in KServe's raw form, in which each value is preceded by its length."""
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


@st.composite
def text_tensor(draw, name: str, most: int = 30):
    """Draw a tensor that obeys the contract, or almost does."""
    values = draw(st.lists(raw_ids, max_size=most))
    if draw(st.integers(0, 99)) == 0:
        values *= MAX_HISTORY // max(len(values), 1) + 1
    shape = draw(st.sampled_from([[1, len(values)]] * 8 + [[len(values), 1], [len(values)], [1, 1, len(values)]]))
    return (name, "BYTES", shape, strings(values))


@st.composite
def titled(draw, tensors):
    """Add titles to a request, mostly one for each id, or take the ids of some titles away."""
    drawn = list(tensors)
    for name in ("HISTORY", "CANDIDATES"):
        place = next((place for place, tensor in enumerate(drawn) if tensor[0] == name), None)
        if not draw(st.booleans()):
            continue
        count = draw(st.integers(0, 5)) if place is None or not draw(st.integers(0, 4)) else drawn[place][2][-1]
        values = draw(st.lists(raw_titles, min_size=min(count, 30), max_size=min(count, 30)))
        if place is not None and not draw(st.integers(0, 3)):
            del drawn[place]
        drawn.append((f"{name.removesuffix('S')}_TITLE", "BYTES", [1, len(values)], strings(values)))
    return drawn


@st.composite
def any_tensor(draw):
    """Draw a tensor of any name and type, whose bytes need not match its shape."""
    name = draw(
        st.sampled_from(["HISTORY", "TOP_K", "CANDIDATES", "USER_ID", "EXCLUDE", "HISTORY_TITLE", "TOKEN", "", "x"])
    )
    datatype = draw(st.sampled_from([*SIZES, "BYTES", "FP16", "nothing"]))
    shape = draw(st.lists(st.integers(-2, 5), max_size=4))
    return (name, datatype, shape, draw(st.binary(max_size=64)))


@st.composite
def requests(draw):
    """Draw a request that mostly is close to the contract, so that it reaches every step, and sometimes far from it."""
    tensors = [draw(text_tensor("HISTORY"))]
    if draw(st.booleans()):
        tensors.append(draw(text_tensor("EXCLUDE")))
    if draw(st.integers(0, 2)) == 0:
        tensors.append(draw(text_tensor("CANDIDATES", MAX_CANDIDATES + 2)))
    if draw(st.integers(0, 2)) == 0:
        tensors = draw(titled(tensors))
    if draw(st.integers(0, 3)) == 0:
        shape = draw(st.sampled_from([[1, 1]] * 9 + [[1, 2]]))
        tensors.append(("POLICY", "BYTES", shape, strings([draw(raw_policies)] * shape[1])))
    if draw(st.booleans()):
        top_k = draw(st.integers(-3, MAX_CANDIDATES + 3) | st.integers(-(2**31), 2**31 - 1))
        tensors.append(
            ("TOP_K", "INT32", draw(st.sampled_from([[1, 1]] * 6 + [[1], [1, 2]])), struct.pack("<i", top_k))
        )
    if draw(st.integers(0, 9)) == 0:
        tensors.append(draw(any_tensor()))
    if draw(st.integers(0, 19)) == 0:
        tensors = draw(st.lists(any_tensor(), max_size=4))
    model = draw(st.sampled_from(["llamarec"] * 12 + ["llamarec_retrieval"] * 6 + ["features", "nothing", ""]))
    outputs = draw(st.sampled_from([None] * 6 + [["SCORE"], ["ITEM_ID", "nothing"], []]))
    return (model, draw(st.sampled_from([""] * 9 + ["1", "2", "x"])), tensors, outputs)


def message(model, version, tensors, outputs) -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name=model, model_version=version)
    for name, datatype, shape, content in tensors:
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        request.raw_input_contents.append(content)
    for name in outputs or ():
        request.outputs.add(name=name)
    return request


def ask(url: str, messages) -> list[tuple[StatusCode, str]]:
    """Send all messages concurrently, and return the code and text of each answer."""

    async def one(stub, sent):
        try:
            await stub.ModelInfer(sent, timeout=DEADLINE)
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details() or ""
        return StatusCode.OK, ""

    async def together():
        async with grpc.aio.insecure_channel(url) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            return await asyncio.gather(*(one(stub, sent) for sent in messages))

    return asyncio.run(together())


@pytest.fixture(scope="module")
def alive(server):
    """Yield a function that returns whether all four steps still give the answer from before the fuzzing."""
    with RecommenderClient(server.url) as client:
        before = client.recommend(["50", "181"])

        def check() -> bool:
            return client.recommend(["50", "181"], timeout=DEADLINE) == before

        yield check


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
@given(st.lists(requests(), min_size=TOGETHER, max_size=TOGETHER))
@example([("llamarec", "", [("HISTORY", "BYTES", [1, 1], b"\xff\xff\xff\xff")], None)])
@example([("llamarec", "", [("HISTORY", "BYTES", [1, 0], b"")], [])])
def test_every_generated_request_gets_a_proper_code(server, alive, sent):
    """Each request gets OK or an error about the request, never INTERNAL, UNKNOWN or DEADLINE_EXCEEDED.

    A good request gets the same answer as before.
    """
    for request, (code, text) in zip(sent, ask(server.url, [message(*request) for request in sent]), strict=True):
        assert code in PROPER, f"{code}: {text}\n{request!r:.600}"
    assert alive()


def test_raw_bytes_on_the_port(server, alive):
    """Random bytes, with or without HTTP/2's connection preface, and frames of wrong length leave the server alive."""

    @settings(max_examples=150, deadline=None)
    @given(st.booleans(), st.binary(max_size=400))
    @example(True, bytes([255, 255, 255, 0, 0, 0, 0, 0, 1]))
    @example(True, bytes(9) * 1000)
    @example(True, bytes([0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0]))
    def send(preface: bool, noise: bytes) -> None:
        host, port = server.url.split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(PREFACE * preface + noise)

    send()
    assert alive()


def test_protobuf_noise_in_a_good_call(server, alive):
    """A message that cannot be parsed gets a proper code or INTERNAL, and leaves the server alive.

    gRPC itself answers INTERNAL to parsing errors (gRPC, "Status codes and their use in gRPC").
    """

    @settings(max_examples=150, deadline=None)
    @given(st.binary(max_size=300))
    def send(noise: bytes) -> None:
        with grpc.insecure_channel(server.url) as channel:
            call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            answer = call.future(noise, timeout=DEADLINE)
            assert answer.code() in PROPER | {StatusCode.INTERNAL}

    send()
    assert alive()


KEY = "key-of-the-fuzzer"


@pytest.fixture(scope="module")
def storing(repository, tmp_path_factory):
    """Yield a server with a store and an admin key."""
    with ExitStack() as opened:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LLAMAREC_STORE", f"sqlite:///{tmp_path_factory.mktemp('fuzz') / 'store'}")
            patch.setenv("LLAMAREC_ADMIN_KEY", KEY)
            server = opened.enter_context(LocalServer(repository))
        yield server


@st.composite
def changes(draw):
    """Draw a request to ``events`` or ``items`` that is close to the contract, and sometimes far from it."""
    model = draw(st.sampled_from(["events"] * 3 + ["items"] * 2))
    items = draw(st.lists(raw_ids, max_size=8))
    count = len(items) if draw(st.integers(0, 4)) else draw(st.integers(0, 9))
    one = [1, 1]
    tensors = [("ITEM_ID", "BYTES", [1, len(items)], strings(items))]
    if model == "events":
        tensors.append(("USER_ID", "BYTES", one, strings([draw(raw_ids)])))
        if draw(st.booleans()):
            times = draw(
                st.lists(st.integers(0, 2**41) | st.integers(-(2**63), 2**63 - 1), min_size=count, max_size=count)
            )
            tensors.append(("TIMESTAMP", "INT64", [1, count], struct.pack(f"<{count}q", *times)))
        if draw(st.booleans()):
            kinds = draw(st.lists(raw_ids | st.just(b"view"), min_size=count, max_size=count))
            tensors.append(("KIND", "BYTES", [1, count], strings(kinds)))
    else:
        tensors.append(("KEY", "BYTES", one, strings([draw(st.just(KEY.encode()) | raw_ids)])))
        tensors.append(
            ("ACTION", "BYTES", one, strings([draw(st.sampled_from([b"add", b"hide", b"show", b"", b"x"]))]))
        )
        if draw(st.integers(0, 3)):
            titles = draw(st.lists(st.text(max_size=40).map(str.encode) | raw_ids, min_size=count, max_size=count))
            tensors.append(("TITLE", "BYTES", [1, count], strings(titles)))
    if draw(st.integers(0, 9)) == 0:
        tensors.append(draw(any_tensor()))
    return (model, "", tensors, None)


@pytest.mark.thorough
def test_every_generated_change_gets_a_proper_code(storing):
    """The same for requests that record events, and that add and hide items; the server still answers afterwards.

    Whatever was hidden or added, a good event is recorded and a good request answered.
    """

    @settings(
        max_examples=max(EXAMPLES // 2, 1),
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )
    @given(st.lists(changes(), min_size=TOGETHER, max_size=TOGETHER))
    def send(sent) -> None:
        for request, (code, text) in zip(sent, ask(storing.url, [message(*change) for change in sent]), strict=True):
            assert code in PROPER, f"{code}: {text}\n{request!r:.600}"

    send()
    with RecommenderClient(storing.url) as client:
        client.show_items(["50", "181"], key=KEY)
        assert client.record("somebody", ["50"], timestamps=[1_732_791_600_000]) == 1
        assert client.recommend(user_id="somebody", timeout=DEADLINE) == client.recommend(["50"], timeout=DEADLINE)
