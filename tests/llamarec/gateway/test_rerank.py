"""Jina's and Cohere's rerank APIs: what query and documents mean, the shapes of the answers, and the limits."""

import pytest
from gateways import FAILURE, FakeClient, open_gateway

from llamarec.gateway.rerank import MOST_DOCUMENTS
from models.ranker.prompt import MOST_CANDIDATES

QUERY = "Star Wars (1977)\r\n\nReturn of the Jedi (1983)\n"
DOCUMENTS = ["Babe (1995)", {"text": "Contact (1997)", "year": 1997}, "Babe (1995)"]


@pytest.fixture
def client():
    return FakeClient()


@pytest.fixture
def http(client):
    with open_gateway(client) as http:
        yield http


def asked(client: FakeClient) -> dict:
    ((_, arguments),) = client.calls
    return {name: value for name, value in arguments.items() if value is not None and name != "timeout"}


def test_titles_are_ranked_in_the_shape_of_jina(http, client):
    """Each line of the query that is not blank is one title. The fake reverses the documents: the last one is best."""
    body = {"model": "llamarec", "query": QUERY, "documents": DOCUMENTS, "top_n": 2}
    answered = http.post("/v1/rerank", json=body, headers={"X-Request-ID": "r-1"}).json()
    assert asked(client) == {
        "history_titles": ["Star Wars (1977)", "Return of the Jedi (1983)"],
        "candidate_titles": ["Babe (1995)", "Contact (1997)", "Babe (1995)"],
        "model": "llamarec",
        "request_id": "r-1",
    }
    assert answered == {
        "id": "r-1",
        "model": "llamarec",
        "usage": {"total_tokens": 0, "prompt_tokens": 0},
        "results": [
            {"index": 2, "relevance_score": 0.5, "document": {"text": "Babe (1995)"}},
            {"index": 1, "relevance_score": pytest.approx(1 / 3), "document": {"text": "Contact (1997)"}},
        ],
        "meta": {"api_version": {"version": "1"}},
    }


def test_documents_are_left_out_on_request(http):
    body = {"query": "", "documents": ["a"], "return_documents": False}
    assert http.post("/v1/rerank", json=body).json()["results"] == [{"index": 0, "relevance_score": 0.5}]


def test_ids_are_ranked_in_the_shape_of_cohere(http, client):
    """Equal ids are one candidate, and get the same score at each of their places. Unknown fields are ignored."""
    documents = ["172", "258", "172"]
    body = {"model": "llamarec/ids", "query": "50\n181", "documents": documents, "max_tokens_per_doc": 9}
    answered = http.post("/v2/rerank", json=body).json()
    arguments = asked(client)
    request_id = arguments.pop("request_id")
    assert arguments == {"history": ["50", "181"], "candidates": ["172", "258"], "model": "llamarec"}
    third = pytest.approx(1 / 3)
    assert answered == {
        "id": request_id,
        "results": [
            {"index": 1, "relevance_score": 0.5},
            {"index": 0, "relevance_score": third},
            {"index": 2, "relevance_score": third},
        ],
        "meta": {"api_version": {"version": "2"}},
    }


def test_an_empty_query_is_an_empty_history(http, client):
    http.post("/v2/rerank", json={"query": " \n", "documents": ["a"]})
    assert asked(client)["history"] == []
    assert "history_titles" not in asked(client)


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank"])
@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"documents": ["a"] * 1000}, 400, "documents holds 1,000: a ranker orders at most 20 of them, or 200 if"),
        ({"model": "rerank-v3.5"}, 400, "there is no model 'rerank-v3.5': give 'llamarec' if"),
        ({"documents": []}, 422, "documents"),
        ({"documents": [{"title": "a"}]}, 422, "documents.0"),
        ({"top_n": 0}, 422, "top_n"),
        ({"query": None}, 422, "query"),
    ],
)
def test_a_bad_request_is_refused_before_a_server_is_asked(http, client, path, change, status, said):
    answered = http.post(path, json={"query": "a", "documents": ["b"], **change})
    assert answered.status_code == status
    assert set(answered.json()) == FAILURE
    assert said in answered.json()["detail"]
    assert not client.calls


def test_no_ranker_orders_more_documents():
    """The gateway does not import the models, so that it is small; the limit is theirs."""
    assert MOST_DOCUMENTS == MOST_CANDIDATES


def test_other_candidates_than_the_documents_are_the_servers_fault():
    """A server that ignores titles answers with items of its own, which are no places."""

    class Ignoring(FakeClient):
        async def recommend(
            self, history=None, *, candidate_titles=None, history_titles=None, model="", timeout=0, request_id=""
        ):
            return await super().recommend([], request_id=request_id)

    with open_gateway(Ignoring()) as http:
        answered = http.post("/v1/rerank", json={"query": "a", "documents": ["b"]})
    assert answered.status_code == 502
    assert set(answered.json()) == FAILURE
