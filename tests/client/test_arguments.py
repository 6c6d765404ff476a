"""Whatever the arguments are, a call ends with an answer or with a ClientError, and it never hangs."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import GOOD, Scripted, serve

from llamarec_client import AsyncRecommenderClient, Policy, RecommenderClient, Request, Tls, canary_model
from llamarec_client.connection import MAX_TIMEOUT
from llamarec_client.errors import ClientError, InvalidRequest, ServerError
from llamarec_client.recommender import MAX_IN_FLIGHT

UNKNOWN = (grpc.StatusCode.INVALID_ARGUMENT, "unknown model")
"""What the server says to any other model; unlike NOT_FOUND, the client does not ask again."""
LONGEST_S = 20.0
"""No call of these tests is allowed to take longer; the server answers at once."""


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """Return what ``call`` returns or raise what it raises; fail if it takes longer."""
    ended: list[Any] = []

    def run() -> None:
        try:
            ended.append(call())
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert ended, f"no end after {seconds:g} s"
    if isinstance(ended[0], BaseException):
        raise ended[0]
    return ended[0]


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Scripted, str]]:
    with serve() as scripted_server:
        yield scripted_server


class Asker:
    """Calls a method of a new client of either kind, within ``LONGEST_S``."""

    def __init__(self, kind: str, url: str) -> None:
        self.kind, self.url = kind, url

    def __call__(self, method: str, *given: Any, url: Any = None, **options: Any) -> Any:
        settings = {name: options.pop(name) for name in ("keep_alive", "tls") if name in options}
        address = self.url if url is None else url

        def plain() -> Any:
            with RecommenderClient(address, **settings) as client:
                return getattr(client, method)(*given, **options)

        async def in_loop() -> Any:
            async with AsyncRecommenderClient(address, **settings) as client:
                return await getattr(client, method)(*given, **options)

        return within(LONGEST_S, plain if self.kind == "plain" else lambda: asyncio.run(in_loop()))


@pytest.fixture(scope="module", params=["plain", "asyncio"])
def ask(request, running) -> Asker:
    scripted, url = running
    scripted.script = lambda model, place: GOOD if model.startswith("llamarec") else UNKNOWN
    return Asker(request.param, url)


# --- any values


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(exclude_categories=[]), max_size=5),
    st.binary(max_size=5),
    st.lists(st.none() | st.integers() | st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from(
        [
            object(),
            type,
            ...,
            1j,
            Decimal(1),
            Fraction(1, 3),
            Path("a"),
            Request(),
            np.int64(3),
            np.uint8(200),
            np.float32(0.5),
            np.float64("nan"),
            np.bool_(True),
            np.str_("a"),
            np.bytes_(b"a"),
            np.datetime64("2026-01-01"),
            np.array(3),
            np.array(["a", "b"]),
            np.array([b"a"]),
            np.array([[1.5]]),
            np.array([], dtype=object),
            2**31,
            -(2**63),
            1e15,
            float("inf"),
        ]
    ),
)
GOOD_ARGUMENTS = {
    "history": st.just(["a"]),
    "exclude": st.none(),
    "candidates": st.none() | st.just(["b"]),
    "top_k": st.integers(1, 20),
    "user_id": st.just("7"),
    "history_titles": st.none() | st.just(["A"]),
    "candidate_titles": st.none() | st.just(["B"]),
    "policy": st.none()
    | st.builds(Policy, max_per_group=ODD, boosts=ODD, repeats=ODD)
    | st.builds(Policy, only_groups=ODD),
    "model": st.sampled_from(["llamarec", "llamarec_retrieval"]),
    "timeout": st.just(5.0),
    "fallback": st.sampled_from([None, "retriever"]),
    "request_id": st.just("one"),
}
"""Most arguments of an example are good, so that each odd value is seen, and not only the first."""


@st.composite
def arguments(draw: st.DrawFn, good: dict[str, st.SearchStrategy[Any]]) -> dict[str, Any]:
    odd = draw(st.sets(st.sampled_from(sorted(good)), max_size=2))
    return {name: draw(ODD if name in odd else strategy) for name, strategy in good.items()}


@settings(max_examples=50, deadline=None)
@given(arguments(GOOD_ARGUMENTS))
def test_any_arguments_end_with_an_answer_or_a_client_error(ask, given_arguments):
    """docs/client.md promises: "Every error is a ClientError", and a call ends within its deadline."""
    history = given_arguments.pop("history")
    with suppress(ClientError):
        assert ask("recommend", history, **given_arguments).request_id


@settings(max_examples=25, deadline=None)
@given(
    arguments(
        {
            "requests": st.just([Request(["a"])]),
            "in_flight": st.integers(1, MAX_IN_FLIGHT),
            "timeout": st.just(5.0),
            "model": st.just("llamarec"),
        }
    )
)
def test_any_arguments_of_a_call_for_many_users_end_too(ask, given_arguments):
    """Each place of the list holds an answer or a ClientError, or the call as a whole raises one."""
    requests = given_arguments.pop("requests")
    with suppress(ClientError):
        for result in ask("recommend_many", requests, **given_arguments):
            assert isinstance(result, (list, ClientError))


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["add_items", "hide_items", "show_items"]),
    arguments(
        {"items": st.just({"a": "A"}), "key": st.just("k"), "timeout": st.just(5.0), "request_id": st.just("one")}
    ),
)
def test_any_arguments_of_a_change_of_items_end_too(ask, method, given_arguments):
    """The server, which has no such model, answers with an error, so that every call ends with one."""
    items = given_arguments.pop("items")
    with pytest.raises(ClientError):
        ask(method, items, **given_arguments)


@settings(max_examples=20, deadline=None)
@given(arguments({"url": st.none(), "keep_alive": st.just(20.0), "tls": st.none() | st.just(Tls())}))
def test_any_settings_of_a_client_end_too(ask, given_settings):
    """An address that is text but names nothing ends with an error of the connection."""
    with suppress(ClientError):
        ask("recommend", ["a"], timeout=1.0, **given_settings)


def test_an_address_that_is_an_array_without_dimensions_is_refused(ask):
    """Such an array is an Iterable by its type and raises a TypeError when it is read."""
    with pytest.raises(InvalidRequest, match=r"the address array\(3\) is not one: give host:port"):
        ask("recommend", ["a"], url=np.array(3))


# --- arguments that ended in an error of gRPC, protobuf or Python, or that hung


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"timeout": None}, "timeout is None: give a number of seconds above 0"),
        ({"timeout": float("inf")}, "timeout is inf"),
        ({"timeout": float("nan")}, "timeout is nan"),
        ({"timeout": 1e15}, "timeout is 1000000000000000.0: .* at most 1,000,000,000"),
        ({"timeout": "3"}, "timeout is '3'"),
        ({"timeout": 0}, "timeout is 0"),
        ({"request_id": 17}, "request_id is 17: give a string"),
        ({"request_id": "\udce9"}, "request_id is"),
        ({"model": None}, "model is None: give a string"),
        ({"model": ""}, "model is ''"),
        ({"fallback": np.array(["retriever", "a"])}, "fallback is array.*give 'retriever' or None"),
        ({"top_k": 0}, "TOP_K is 0: give a whole number from 1"),
        ({"top_k": True}, "TOP_K is True"),
        ({"user_id": 3}, "USER_ID holds 3"),
        ({"policy": {"max_per_group": 1}}, "policy is {'max_per_group': 1}: give a Policy"),
        ({"policy": Policy(max_per_group=0)}, "POLICY: max_per_group is 0: give a whole number from 1"),
        ({"policy": Policy(only_groups="Comedy")}, "POLICY: only_groups is 'Comedy': give a list of names"),
        ({"policy": Policy(never_groups=[3])}, "POLICY: never_groups holds 3"),
        ({"policy": Policy(boosts={"50": float("nan")})}, r"POLICY: boosts\['50'\] is nan: give a factor above 0"),
        ({"policy": Policy(boosts=["50"])}, "POLICY: boosts is .*: give a dict"),
        ({"policy": Policy(repeats="some")}, 'POLICY: repeats is \'some\': give "none", "all" or a number'),
        ({"policy": Policy(only_groups=["x" * 70_000])}, "POLICY has 70,021 bytes: give at most 65,536"),
        ({"history_titles": "A"}, "HISTORY_TITLE is one string: give a list of titles"),
        ({"candidate_titles": [None]}, "CANDIDATE_TITLE holds None: titles are strings"),
        ({"history_titles": ["A", "B"]}, "HISTORY holds 1 ids and HISTORY_TITLE 2 titles: give one title for each id"),
        (
            {"candidates": ["b", "c"], "candidate_titles": []},
            "CANDIDATES holds 2 ids and CANDIDATE_TITLE 0 titles: .* which may be empty, or no ids",
        ),
    ],
)
def test_an_argument_that_cannot_be_sent_is_named(ask, options, named):
    """These were a TypeError, an OverflowError or a ValueError of gRPC and protobuf. That None or infinity means "no
    timeout" is a common guess (triton-inference-server/server#8554).
    """
    with pytest.raises(InvalidRequest, match=named):
        ask("recommend", ["a"], **options)


@pytest.mark.parametrize("history", [None, 3, [None], [b"a"], np.array([b"a"]), np.array([[1.5]])])
def test_a_history_of_something_else_is_named(ask, history):
    """``history=None`` was "'NoneType' object is not iterable"; bytes stay refused, because ids are text."""
    with pytest.raises(InvalidRequest, match=r"HISTORY (is|holds) .*item ids"):
        ask("recommend", history)


@pytest.mark.parametrize("in_flight", [0, -1, None, 2.5, "x", 10**9])
def test_an_impossible_number_in_flight_is_refused(ask, in_flight):
    """With ``in_flight=0`` the asyncio client never returned: it waited for a semaphore of 0."""
    with pytest.raises(InvalidRequest, match=r"in_flight is .*: give a whole number from 1 to 1024"):
        ask("recommend_many", [Request(["a"])], in_flight=in_flight)


def test_a_request_of_another_type_fails_in_its_own_place(ask):
    """``recommend_many([{...}])`` was an AttributeError, and the other users got no answer."""
    first, second = ask("recommend_many", [{"history": ["a"]}, Request(["a"])])
    assert isinstance(first, InvalidRequest)
    assert "is not a request: give Request objects" in str(first)
    assert [row.item_id for row in second] == ["a"]


@pytest.mark.parametrize("requests", [None, 3, Request(["a"])])
def test_requests_that_are_no_list_are_refused(ask, requests):
    """A single Request in place of a list was "'Request' object is not iterable"."""
    with pytest.raises(InvalidRequest, match="give a list of Request objects"):
        ask("recommend_many", requests)


def test_a_closed_client_says_so(running):
    """It was the ValueError "Cannot invoke RPC on closed channel!" (grpc/grpc#16290), or UsageError with asyncio."""
    _, url = running
    client = RecommenderClient(url)
    client.close()
    client.close()
    with pytest.raises(InvalidRequest, match="is closed: open a new one"):
        within(LONGEST_S, lambda: client.recommend(["a"]))

    async def in_loop() -> None:
        client = AsyncRecommenderClient(url)
        await client.close()
        await client.recommend(["a"])

    with pytest.raises(InvalidRequest, match="is closed: open a new one"):
        within(LONGEST_S, lambda: asyncio.run(in_loop()))


def test_closing_a_client_ends_its_calls_with_a_client_error(running):
    """Closing a channel cancels its calls in flight, so a task ended as cancelled that nobody had cancelled. A task
    that really is cancelled still ends as cancelled.
    """
    scripted, url = running
    before, scripted.script = scripted.script, lambda model, place: 2.0

    async def in_loop() -> list[Any]:
        client = AsyncRecommenderClient(url)
        closed, cancelled = (asyncio.create_task(client.recommend(["a"])) for _ in range(2))
        await asyncio.sleep(0.3)
        cancelled.cancel()
        await asyncio.wait([cancelled])
        await client.close()
        return await asyncio.gather(closed, cancelled, return_exceptions=True)

    try:
        closed, cancelled = within(LONGEST_S, lambda: asyncio.run(in_loop()))
    finally:
        scripted.script = before
    assert isinstance(closed, ClientError)
    assert isinstance(cancelled, asyncio.CancelledError)


def test_an_asyncio_client_in_another_event_loop_says_so(running):
    """It was a RuntimeError of asyncio, "Event loop is closed"."""
    _, url = running
    clients = []

    async def open_one() -> None:
        clients.append(AsyncRecommenderClient(url))
        await clients[0].recommend(["a"])

    async def use() -> None:
        await clients[0].recommend(["a"])

    asyncio.run(open_one())
    with pytest.raises(ClientError, match="in the event loop that opened it"):
        asyncio.run(use())


def drop_a_tensor(answer: Any) -> None:
    del answer.outputs[1], answer.raw_output_contents[1]


def break_an_id(answer: Any) -> None:
    answer.raw_output_contents[0] = b"\1\0\0\0\xff"


@pytest.mark.parametrize("change", [drop_a_tensor, break_an_id])
def test_an_answer_that_breaks_the_contract_is_a_server_error(monkeypatch, change):
    """A model of that name which somebody else wrote: its answer lacks a tensor, or holds an id that is not UTF-8."""
    whole = Scripted.ModelInfer

    def changed(self: Scripted, request: Any, context: Any) -> Any:
        answer = whole(self, request, context)
        change(answer)
        return answer

    monkeypatch.setattr(Scripted, "ModelInfer", changed)
    with (
        serve() as (_, url),
        RecommenderClient(url) as client,
        pytest.raises(ServerError, match="does not follow the contract"),
    ):
        client.recommend(["a"])


@pytest.mark.parametrize("share", [None, "5%", float("nan"), 2])
def test_a_canarys_share_is_checked(share):
    """``canary_model`` is public, too: None was a TypeError, and NaN silently no canary."""
    with pytest.raises(InvalidRequest, match="give a number from 0 to 1"):
        canary_model("llamarec", "7", share)


# --- NumPy's scalars


@pytest.mark.parametrize("top_k", [np.int64(5), np.int32(5), np.uint8(5), np.array(5)])
def test_numpy_integers_are_whole_numbers(ask, top_k):
    """``np.int64(5)`` was refused with "TOP_K is 5: give a whole number", the fault of maroba/findiff#32."""
    assert [row.item_id for row in ask("recommend", ["a"], top_k=top_k)] == ["a"]


def test_numpy_scalars_are_numbers_and_ids(ask):
    """Timeouts and counts from NumPy, and ids of a NumPy array of strings, are what they are in Python."""
    ids = np.array(["a", "b"])
    answer = ask(
        "recommend", ids, timeout=np.float32(5), user_id=ids[0], request_id=np.str_("one"), keep_alive=np.int64(20)
    )
    assert ([row.item_id for row in answer], answer.request_id) == (["b"], "one")
    assert len(ask("recommend_many", [Request(ids)], in_flight=np.int64(2))) == 1


def test_the_longest_timeout_is_possible(ask):
    """Neither gRPC's deadline nor Triton's parameter of microseconds overflows at the largest allowed value."""
    assert [row.item_id for row in ask("recommend", ["a"], timeout=MAX_TIMEOUT)] == ["a"]


# --- connecting


def test_a_slow_link_can_be_connected_to(running):
    """A connection over a link with a delay of 0.3 s in each direction takes longer than the tenth of a second that an
    attempt was given: ``grpc.min_reconnect_backoff_ms`` is also its deadline (grpc/grpc#33423).
    """
    _, url = running
    host, port = url.split(":")
    listener = socket.create_server(("127.0.0.1", 0))

    def forward(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                time.sleep(0.3)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection((host, int(port)))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=forward, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        with RecommenderClient(f"127.0.0.1:{listener.getsockname()[1]}") as client:
            assert [row.item_id for row in client.recommend(["a"], timeout=15)] == ["a"]
    finally:
        listener.close()
