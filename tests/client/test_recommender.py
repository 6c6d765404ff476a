"""The gRPC clients against a real server with echo steps: the inputs sent, the answers returned, the errors raised."""

import asyncio
import time
import urllib.request

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

import llamarec_client
from llamarec_client import errors
from llamarec_client.contract import RETRIEVAL_ENSEMBLE
from llamarec_client.errors import ClientError, InvalidRequest, RequestTimeout, ServerError, ServerUnavailable
from llamarec_client.recommender import AsyncRecommenderClient, Recommendation, RecommenderClient, Request
from serving.server.programs import free_ports

IDS = st.lists(st.characters(exclude_characters="~?", exclude_categories=["Cs"]), max_size=50)
"""Ids of one character each, in any script. Excluded are surrogates, which cannot be encoded, ``~``, for which the echo
takes a second, and ``?``, which the echo treats as an unknown item."""


@pytest.fixture(scope="module")
def recommender(echo_server):
    with RecommenderClient(echo_server.url) as client:
        yield client


@settings(max_examples=60, deadline=None)
@given(history=IDS, exclude=st.none() | IDS, candidates=st.none() | IDS, top_k=st.none() | st.integers(1, 20))
def test_every_input_arrives_and_the_answer_comes_back(recommender, history, exclude, candidates, top_k):
    """The echo's retriever returns the history or the candidates without EXCLUDE, cut to TOP_K, with ranks from 1."""
    answer = recommender.recommend(
        history, exclude=exclude, candidates=candidates, top_k=top_k, user_id="7", model=RETRIEVAL_ENSEMBLE
    )
    chosen = [item for item in (history if candidates is None else candidates) if item not in (exclude or [])]
    assert answer == [Recommendation(item, -float(place), place + 1) for place, item in enumerate(chosen)][:top_k]


def test_titles_arrive_with_their_ids(echo_server):
    """The echo's features return the titles as the tensors for the prompt, in order; ids may be left out or empty."""
    given = Request(
        ["a", "b"], candidates=["c", "d"], history_titles=["A", "Bé\n"], candidate_titles=["", "D"], user_id="7"
    )
    texts = [grpc.InferRequestedOutput(name) for name in ("HISTORY_TEXT", "GIVEN_TEXT", "GIVEN_ID")]
    with grpc.InferenceServerClient(echo_server.url) as client:
        result = client.infer("features", given.inputs(), outputs=texts)
        found = {output.name(): result.as_numpy(output.name())[0].tolist() for output in texts}
        assert found == {
            "HISTORY_TEXT": [b"A", "Bé\n".encode()],
            "GIVEN_TEXT": [b"", b"D"],
            "GIVEN_ID": [b"c", b"d"],
        }
        alone = client.infer("features", Request([], history_titles=["A"]).inputs(), outputs=texts)
        assert alone.as_numpy("HISTORY_TEXT").tolist() == [[b"A"]]
        assert alone.as_numpy("GIVEN_TEXT").shape == (1, 0)


@pytest.mark.parametrize("kind", ["recommend", "asyncio", "recommend_many"])
def test_titles_pass_through_every_method(echo_server, kind):
    """The echo ranks the candidates backwards, whatever their titles are."""
    options = {"candidates": ["c", "d"], "history_titles": ["A"], "candidate_titles": ["C", ""]}

    async def ask():
        async with AsyncRecommenderClient(echo_server.url) as client:
            return await client.recommend(["a"], **options)

    if kind == "asyncio":
        answer = asyncio.run(ask())
    else:
        with RecommenderClient(echo_server.url) as client:
            one = kind == "recommend"
            answer = (
                client.recommend(["a"], **options) if one else client.recommend_many([Request(["a"], **options)])[0]
            )
    assert [row.item_id for row in answer] == ["d", "c"]


def test_the_ranker_answers_by_default(recommender):
    """The echo's ranker reverses the candidates; without candidates, all four steps run and the answer is empty."""
    assert [row.item_id for row in recommender.recommend(["a", "b", "c"], top_k=2)] == ["c", "b"]
    assert recommender.recommend([]) == []
    assert recommender.recommend(["a"], exclude=["a"]) == []


@pytest.mark.parametrize("length", [1_000, 10_000])
def test_long_histories_pass(recommender, length):
    """A HISTORY of up to 10,000 ids, the contract's limit, passes through every step."""
    assert len(recommender.recommend(["x"] * length)) == length


@pytest.mark.parametrize("model", ["llamarec", RETRIEVAL_ENSEMBLE])
def test_bad_input_names_step_and_tensor(recommender, model):
    """The ensemble passes a step's INVALID_ARGUMENT on unchanged; the message starts with the name of the step."""
    with pytest.raises(InvalidRequest, match=r"^features: HISTORY holds 'bad'$"):
        recommender.recommend(["bad"], model=model)


def test_a_fault_of_a_step_is_a_server_error(recommender):
    """Any other exception of a step becomes INTERNAL, and the message names the step and the exception."""
    with pytest.raises(ServerError, match=r"INTERNAL: features: TypeError"):
        recommender.recommend(["two characters"])


def test_several_users_in_one_request_are_refused(echo_server):
    """The contract allows one user per request. The batch dimension permits more, so features refuses it by name."""
    tensor = grpc.InferInput("HISTORY", [2, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[b"a"], [b"b"]], dtype=object))
    with grpc.InferenceServerClient(echo_server.url) as client, pytest.raises(InferenceServerException) as raised:
        client.infer("llamarec", [tensor])
    assert raised.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert "features: HISTORY holds 2 users" in raised.value.message()


def test_a_subset_of_the_outputs_can_be_asked_for(echo_server):
    """A request for one output is answered; it would deadlock if an ensemble exposed an intermediate tensor."""
    tensor = grpc.InferInput("HISTORY", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[b"a"]], dtype=object))
    with grpc.InferenceServerClient(echo_server.url) as client:
        for model in ("llamarec", RETRIEVAL_ENSEMBLE):
            result = client.infer(model, [tensor], outputs=[grpc.InferRequestedOutput("SCORE")], client_timeout=10)
            assert result.as_numpy("ITEM_ID") is None
            assert result.as_numpy("SCORE").shape == (1, 1)


def test_unknown_items_are_counted_on_the_metrics_endpoint(echo_server, recommender):
    """The contract says that unknown ids of a history are skipped and counted; the echo treats ``?`` as unknown."""

    def counted() -> float:
        with urllib.request.urlopen(f"http://{echo_server.metrics_url}/metrics") as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("llamarec_unknown_items_total"))

    before = counted()
    recommender.recommend(["a", "?", "?"])
    end = time.monotonic() + 10  # a step reports its counts twice a second
    while counted() == before and time.monotonic() < end:
        time.sleep(0.1)
    assert counted() == before + 2


def test_concurrent_requests_share_batches_and_spoil_nothing(echo_server):
    """Of 200 concurrent requests with 25 lengths, every tenth is bad; each gets its own answer or its own error."""

    async def ask() -> list[list[Recommendation] | BaseException]:
        async with AsyncRecommenderClient(echo_server.url) as client:
            histories = [["bad"] if n % 10 == 0 else [chr(65 + n)] * (n % 25) for n in range(200)]
            return await asyncio.gather(*(client.recommend(h, timeout=60) for h in histories), return_exceptions=True)

    for n, answer in enumerate(asyncio.run(ask())):
        if n % 10 == 0:
            assert isinstance(answer, InvalidRequest)
        else:
            assert [row.item_id for row in answer] == [chr(65 + n)] * (n % 25)


def test_each_request_reaches_the_steps_by_itself(echo_server):
    """Histories of 32 lengths that wait for the retriever are handed to it one by one; none waits for others to end."""

    def executions(client: grpc.InferenceServerClient) -> int:
        return client.get_inference_statistics("retriever").model_stats[0].execution_count

    async def ask() -> None:
        async with AsyncRecommenderClient(echo_server.url) as client:
            # The first request occupies the step for a second while the others queue.
            slow = asyncio.create_task(client.recommend(["~"]))
            await asyncio.sleep(0.3)
            await asyncio.gather(*(client.recommend(["x"] * n) for n in range(32)))
            await slow

    with grpc.InferenceServerClient(echo_server.url) as client:
        before = executions(client)
        asyncio.run(ask())
        assert executions(client) - before == 33


def test_the_deadline_is_kept(recommender):
    """A request that takes 1 s is abandoned at its deadline of 0.2 s, and the error suggests a longer one."""
    start = time.monotonic()
    with pytest.raises(RequestTimeout, match=r"within 0.2 s: allow more time"):
        recommender.recommend(["~"], timeout=0.2)
    assert time.monotonic() - start < 0.9


def test_no_server_names_the_address_and_the_command():
    """Without a server, the error names the address and the command; it is raised at once, not after the deadline."""
    url = f"127.0.0.1:{free_ports(1)[0]}"
    start = time.monotonic()
    with (
        RecommenderClient(url) as client,
        pytest.raises(ServerUnavailable, match=f"{url}: start one with `llamarec serve`"),
    ):
        client.recommend(["a"])
    assert time.monotonic() - start < 5


def test_asyncio_raises_the_same_errors(echo_server):
    """The asyncio client raises the same error types as the synchronous client."""

    async def ask(url: str, history: list[str], **options: float) -> None:
        async with AsyncRecommenderClient(url) as client:
            await client.recommend(history, **options)

    for url, history, options, expected in (
        (f"127.0.0.1:{free_ports(1)[0]}", ["a"], {}, ServerUnavailable),
        (echo_server.url, ["bad"], {}, InvalidRequest),
        (echo_server.url, ["~"], {"timeout": 0.2}, RequestTimeout),
    ):
        with pytest.raises(expected):
            asyncio.run(ask(url, history, **options))


def test_an_unknown_model_is_named(recommender):
    """The error names a model that the running server does not serve because it was never exported."""
    with pytest.raises(ServerUnavailable, match="does not serve nothing"):
        recommender.recommend(["a"], model="nothing")


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        ({"history": "abc"}, "HISTORY is one string"),
        ({"history": [1]}, "HISTORY holds 1: item ids are strings"),
        ({"history": ["\udce9"]}, "HISTORY holds '\\\\udce9'"),
        ({"history": [], "exclude": [b"a"]}, "EXCLUDE holds b'a'"),
        ({"history": [], "candidates": "abc"}, "CANDIDATES is one string"),
        ({"history": [], "top_k": 2**31}, "TOP_K is 2147483648"),
        ({"history": [], "top_k": 1.5}, "TOP_K is 1.5"),
    ],
)
def test_what_cannot_be_sent_is_refused_before_sending(recommender, request_, named):
    """The client refuses values that no tensor can hold and names the tensor; the server checks the limits."""
    with pytest.raises(InvalidRequest, match=named):
        recommender.recommend(**request_)


def test_every_error_is_a_client_error():
    """Every error of the module is public and a ClientError, so ``except ClientError`` is enough for a service."""
    defined = {
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, BaseException) and kind.__module__ == errors.__name__
    }
    assert {name for name in defined if issubclass(getattr(errors, name), ClientError)} == defined
    assert len(defined) == 7
    assert defined <= set(llamarec_client.__all__)
