"""The gateway's own endpoints: the call of the client that a body becomes, the answer, and every way to fail."""

import json
import os
import re

import pytest
from gateway_bodies import bodies, check_failure
from gateways import FAILURE, FakeClient, open_gateway
from hypothesis import example, given, settings
from starlette.testclient import TestClient

from llamarec.gateway.app import create_app
from llamarec.gateway.bodies import EventsBody, RecommendBody, SimilarBody
from llamarec.gateway.keys import ApiKeys
from llamarec.gateway.options import GatewayOptions
from llamarec_client import (
    ClientError,
    InvalidRequest,
    Overloaded,
    Policy,
    RequestTimeout,
    ServerError,
    ServerUnavailable,
    StepDied,
)


@pytest.fixture
def client():
    return FakeClient()


@pytest.fixture
def http(client):
    with open_gateway(client) as http:
        yield http


# --- what is asked and answered


def test_a_body_becomes_one_call(http, client):
    """Every field of the body is an argument of the client, and the request's id and deadline are passed on."""
    body = {
        "history": ["50"],
        "history_titles": ["Star Wars (1977)"],
        "user_id": "17",
        "exclude": ["1"],
        "candidates": ["172", "258"],
        "candidate_titles": ["", "Contact (1997)"],
        "top_k": 1,
        "policy": {"boosts": {"258": 2}, "repeats": None},
        "fallback": "retriever",
        "model": "llamarec_canary",
    }
    assert set(body) == set(RecommendBody.model_fields)
    answered = http.post("/v1/recommend", json=body, headers={"X-Request-ID": "r-1", "X-Request-Timeout": "5"})
    ((method, arguments),) = client.calls
    assert method == "recommend"
    assert 4 < arguments.pop("timeout") <= 5
    policy = Policy(boosts={"258": 2.0}, repeats=None)  # a field that is null is not one that is absent
    assert arguments == {**body, "policy": policy, "request_id": "r-1"}
    assert answered.status_code == 200
    assert answered.headers["X-Request-ID"] == "r-1"
    assert answered.json() == {
        "items": [{"item_id": "258", "score": 0.5, "retriever_rank": 1}],
        "model": "llamarec_canary",
        "degraded": False,
        "request_id": "r-1",
    }


def test_absent_fields_are_not_given(http, client):
    """So that a user without a history in the body gets the one in the store. Ids of requests are made and differ."""
    ids = {http.post("/v1/recommend", json={"user_id": "17"}).json()["request_id"] for _ in range(2)}
    assert all(arguments["history"] is None for _, arguments in client.calls)
    assert len(ids) == 2
    assert ids == {arguments["request_id"] for _, arguments in client.calls}


def test_a_caller_cannot_extend_the_deadline(client):
    with open_gateway(client, timeout=2.0) as http:
        http.post("/v1/recommend", json={"history": []}, headers={"X-Request-Timeout": "60"})
    assert client.calls[0][1]["timeout"] <= 2
    assert client.closed


def test_events_are_recorded(http, client):
    body = {"user_id": "17", "item_ids": ["50", "181"], "timestamps": [1, 2], "kinds": ["view", "purchase"]}
    assert set(body) == set(EventsBody.model_fields)
    answered = http.post("/v1/events", json=body, headers={"X-Request-ID": "r-1"})
    assert answered.json() == {"new": 2, "request_id": "r-1"}
    ((method, arguments),) = client.calls
    assert method == "record"
    assert arguments.pop("timeout") > 29
    assert arguments == {**body, "request_id": "r-1"}


def test_similar_items_are_found(http, client):
    body = {"item_id": "50", "top_k": 3}
    assert set(body) == set(SimilarBody.model_fields)
    answered = http.post("/v1/similar", json=body, headers={"X-Request-ID": "r-1"}).json()
    items = [{"item_id": "181", "score": 0.75, "transitions": 0.5, "titles": 1.0}]
    assert answered == {"items": items, "request_id": "r-1"}
    ((_, arguments),) = client.calls
    assert arguments.pop("timeout") > 29
    assert arguments == {**body, "request_id": "r-1"}


def test_openapi_describes_every_endpoint_with_examples(http):
    """Each endpoint has a description of its body with at least one example, its failures, and the key."""
    described = http.get("/openapi.json").json()
    for path in ("/v1/recommend", "/v1/events", "/v1/similar", "/v1/rerank", "/v2/rerank"):
        endpoint = described["paths"][path]["post"]
        body = json.dumps(endpoint["requestBody"]["content"]["application/json"]["schema"])
        assert "examples" in body
        assert set(re.findall(r"#/components/schemas/(\w+)", body)) <= set(described["components"]["schemas"])
        assert {"400", "401", "413", "422", "429", "502", "503", "504"} <= set(endpoint["responses"])
        assert endpoint["security"] == [{"HTTPBearer": []}]


@pytest.mark.parametrize(
    ("policy", "place"),
    [
        ({"max_per_group": 0}, "policy.max_per_group"),
        ({"only": ["Comedy"]}, "policy.only"),
        ({"boosts": {"258": "much"}}, "policy.boosts.258"),
        ({"repeats": "some"}, "policy.repeats"),
    ],
)
def test_a_policy_that_is_none_is_refused(http, client, policy, place):
    """The detail names the field within the policy, and no server is asked."""
    answered = http.post("/v1/recommend", json={"history": [], "policy": policy})
    assert answered.status_code == 422
    assert place in answered.json()["detail"]
    assert client.calls == []


def test_the_page_answers_what_is_not_the_gateways(client):
    """Mounted behind the endpoints: with its own paths, and none of the gateway's."""

    async def page(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": scope["path"].encode()})

    options = GatewayOptions()
    with TestClient(create_app(options, ApiKeys(), lambda: client, page)) as http:
        assert http.get("/api/facts").text == "/api/facts"
        assert http.get("/health/live").text == "alive\n"
        assert http.post("/v1/recommend", json={"history": []}).json()["model"] == "llamarec"


# --- failures


@pytest.mark.parametrize(
    ("error", "status", "name", "again"),
    [
        (InvalidRequest("features: TOP_K is 21"), 400, "invalid_request", False),
        (Overloaded("queue full"), 503, "overloaded", True),
        (ServerUnavailable("no server"), 503, "unavailable", True),
        (RequestTimeout("no answer"), 504, "timeout", False),
        (StepDied("ranker is dead"), 503, "step_died", True),
        (ServerError("INTERNAL"), 502, "server_error", False),
        (ClientError("not sent \ud800"), 502, "not_sent", False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, ClientError) else None,
)
def test_every_error_of_the_client_has_a_status(http, client, error, status, name, again):
    """The text of the error is the detail. A caller is told to retry where another attempt may succeed soon."""
    client.error = error
    for path, body in (("/v1/recommend", {"history": []}), ("/v1/events", {"user_id": "u", "item_ids": []})):
        answered = http.post(path, json=body, headers={"X-Request-ID": "r-1"})
        detail = str(error).replace("\ud800", "?")
        assert answered.status_code == status
        assert answered.json() == {"error": name, "detail": detail, "request_id": "r-1"}
        assert ("Retry-After" in answered.headers) == again


def test_a_fault_of_the_gateway_is_told_without_its_text(http, client, caplog):
    """What is unexpected is logged under the request's id, and the answer has still the same shape."""
    client.error = RuntimeError("secret")
    answered = http.post("/v1/recommend", json={"history": []}, headers={"X-Request-ID": "r-1"})
    assert answered.status_code == 500
    assert set(answered.json()) == FAILURE
    assert "secret" not in answered.text
    assert "r-1" in caplog.text


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [
        (b"{", 400, "not valid JSON"),
        (b'"\xff"', 400, "JSON"),
        (b"[" * 100_000, 400, "JSON"),
        (b"[]", 422, "JSON object"),
        (b"", 400, "JSON"),
        (b'{"historyy": []}', 422, "historyy"),
        (b'{"history": "50"}', 422, "history"),
        (b'{"history": [50]}', 422, "history.0"),
        (b'{"history": [], "top_k": 0}', 422, "top_k"),
        (b'{"history": [], "top_k": "5"}', 422, "top_k"),
        (b'{"history": [], "model": "items"}', 422, "model"),
    ],
)
def test_a_bad_body_is_named(http, client, content, status, said):
    answered = http.post("/v1/recommend", content=content, headers={"Content-Type": "application/json"})
    assert answered.status_code == status
    assert set(answered.json()) == FAILURE
    assert said in answered.json()["detail"]
    assert not client.calls


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/recommend", 405), ("POST", "/v1/x", 404)])
def test_a_wrong_path_has_the_same_shape(http, method, path, status):
    answered = http.request(method, path, json={})
    assert answered.status_code == status
    assert set(answered.json()) == FAILURE
    assert answered.json()["request_id"] == answered.headers["X-Request-ID"]


# --- fuzz

EXAMPLES = int(os.environ.get("FUZZ_REQUESTS", "100"))


@pytest.fixture(scope="module")
def any_http():
    with open_gateway(FakeClient()) as http:
        yield http


@settings(max_examples=EXAMPLES, deadline=None)
@given(bodies())
@example(("/v1/recommend", b'{"history": ["\\ud800"]}', {"Content-Type": "application/json"}))
def test_any_body_ends_with_a_proper_status(any_http, sent):
    """A success or an error about the request, in the one shape, and never a fault of the gateway.

    A good request gets the same answer as ever afterwards.
    """
    path, content, headers = sent
    answered = any_http.post(path, content=content, headers=headers)
    assert answered.status_code in {200, 400, 422}
    check_failure(answered)
    good = any_http.post("/v1/recommend", json={"history": ["50"]}, headers={"X-Request-ID": "good"})
    assert [row["item_id"] for row in good.json()["items"]] == ["c", "b", "a"]
    assert (good.status_code, good.headers["X-Request-ID"]) == (200, "good")
