"""The HTTP gateway in front of the real tritonserver: the same answers as over gRPC, and the steps' own refusals."""

from dataclasses import asdict

import pytest
from gateways import FAILURE, open_gateway

from llamarec_client import AsyncRecommenderClient, RecommenderClient
from llamarec_client.contract import MAX_CANDIDATES

HISTORY = ["50", "181"]
CANDIDATES = ["172", "258", "8", "100"]


@pytest.fixture(scope="module")
def http(server):
    with open_gateway(lambda: AsyncRecommenderClient(server.url)) as http:
        yield http


@pytest.fixture(scope="module")
def client(server):
    with RecommenderClient(server.url) as client:
        yield client


@pytest.mark.parametrize(
    "question",
    [
        {"history": HISTORY},
        {"history": HISTORY, "top_k": 3, "model": "llamarec_retrieval"},
        {"history": [], "exclude": ["50"], "fallback": "retriever"},
        {"history": HISTORY, "candidates": CANDIDATES},
    ],
)
def test_answers_are_those_of_grpc(http, client, question):
    """Items, scores and ranks are equal to the last bit: JSON keeps the shortest text of each number."""
    answered = http.post("/v1/recommend", json=question).json()
    direct = client.recommend(**question)
    assert [(row["item_id"], row["score"], row["retriever_rank"]) for row in answered["items"]] == [
        (row.item_id, row.score, row.retriever_rank) for row in direct
    ]
    assert answered["model"] == direct.model
    assert not answered["degraded"]


def test_ids_are_reranked_as_candidates(http, client):
    body = {"model": "llamarec/ids", "query": "\n".join(HISTORY), "documents": CANDIDATES}
    results = http.post("/v2/rerank", json=body).json()["results"]
    direct = client.recommend(HISTORY, candidates=CANDIDATES)
    assert [(CANDIDATES[each["index"]], each["relevance_score"]) for each in results] == [
        (row.item_id, row.score) for row in direct
    ]


def test_titles_are_reranked_without_a_catalogue(http, client):
    """As the client's call with the same titles, whose items are the places of the candidates."""
    history, documents = ["Star Wars (1977)", "Return of the Jedi (1983)"], ["Babe (1995)", "A film nobody knows", "Go"]
    body = {"query": "\n".join(history), "documents": documents}
    results = http.post("/v1/rerank", json=body).json()["results"]
    direct = client.recommend(history_titles=history, candidate_titles=documents)
    assert [(str(each["index"]), each["relevance_score"]) for each in results] == [
        (row.item_id, row.score) for row in direct
    ]
    assert [each["document"]["text"] for each in results] == [documents[int(row.item_id)] for row in direct]


def test_similar_items_are_those_of_the_client(http, client):
    found = http.post("/v1/similar", json={"item_id": "50", "top_k": 5}).json()["items"]
    direct = client.similar("50", top_k=5)
    assert len(direct) == 5
    assert found == [asdict(row) for row in direct]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/recommend", {"history": HISTORY, "top_k": 21}, "features: TOP_K is 21: ask for 1 to 20"),
        ("/v1/recommend", {"history": HISTORY, "candidates": ["nothing"]}, "nothing"),
        ("/v1/recommend", {}, "HISTORY"),
        (
            "/v1/rerank",
            {"model": "llamarec/ids", "query": "50", "documents": [str(n) for n in range(1, MAX_CANDIDATES + 2)]},
            f"the ranker orders at most {MAX_CANDIDATES}",
        ),
    ],
)
def test_what_a_step_refuses_is_told(http, path, body, said):
    """With the step's own sentence, which has the limit, and the status of a bad request."""
    answered = http.post(path, json=body)
    assert answered.status_code == 400
    assert set(answered.json()) == FAILURE
    assert said in answered.json()["detail"]


def test_the_gateway_is_ready_with_the_server(http):
    assert http.get("/health/ready").status_code == 200
