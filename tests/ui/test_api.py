"""The HTTP API of the demo's page: the same answers as the gRPC client's, titles, users and the prompt."""

import json
import urllib.error
import urllib.parse
import urllib.request

import pytest

from llamarec_client.recommender import RecommenderClient
from serving.offline import ExportedSteps


def get(url: str, body: object = None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def test_lists_are_the_servers_own(page, server):
    """Ids, scores, retriever ranks and order equal those of two direct gRPC calls."""
    answer = get(f"{page}/api/recommend", {"history": ["50", "181"]})
    with RecommenderClient(server.url) as client:
        for name, model in (("retrieved", "llamarec_retrieval"), ("ranked", "llamarec")):
            direct = client.recommend(["50", "181"], model=model)
            assert [(row["id"], row["retriever_rank"]) for row in answer[name]] == [
                (r.item_id, r.retriever_rank) for r in direct
            ]
            assert [row["score"] for row in answer[name]] == [r.score for r in direct]
    assert not answer["degraded"]
    assert all(time["compute_ms"] > 0 for time in answer["steps"].values())
    assert list(answer["steps"]) == ["features", "retriever", "prompt_builder", "ranker"]


def test_the_prompt_is_the_one_that_was_ranked(page, repository):
    """The displayed prompt, scored offline by the exported ranker, gives the page's ranked list."""
    answer = get(f"{page}/api/recommend", {"history": ["50", "no such item", "181"]})
    steps = ExportedSteps.load(repository)
    request = steps.features.encode([b"50", b"no such item", b"181"])
    candidates = steps.candidates(request)
    text, prompt = steps.prompts.fit(request.history, candidates.items)
    assert answer["prompt"] == text
    assert answer["tokens"] == len(prompt.tokens)
    places, _ = steps.ranker.rank(prompt, candidates.scores, candidates.ranks)
    assert [row["retriever_rank"] for row in answer["ranked"]] == candidates.ranks[places].tolist()
    assert answer["unknown"] == ["no such item"]


def test_titles_are_found_by_words_and_by_id(page):
    """A title matches if every word occurs in it, regardless of case; item 50 of MovieLens-100K is Star Wars."""
    assert get(f"{page}/api/items?q=WARS+star")[0] == {"id": "50", "title": "Star Wars (1977)"}
    assert get(f"{page}/api/items?q=50")[0]["id"] == "50"
    assert get(f"{page}/api/items?q=no+such+film+at+all") == []
    assert get(f"{page}/api/items?item=50&item=nothing") == [
        {"id": "50", "title": "Star Wars (1977)"},
        {"id": "nothing", "title": ""},
    ]


def test_users(page):
    """MovieLens-100K has 943 users; a user's history does not contain the held-out next item."""
    assert get(f"{page}/api/facts")["users"] == 943
    user = get(f"{page}/api/users/10")
    assert user["next"] not in user["history"]
    assert {row["id"] for row in get(f"{page}/api/users?q=94")} >= {"94", "940"}
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(f"{page}/api/users/nobody")


def test_bad_requests_are_refused_with_a_sentence(page):
    """An id of 513 bytes exceeds the contract's limit of 512; the server's message is passed on with status 400."""
    with pytest.raises(urllib.error.HTTPError) as raised:
        get(f"{page}/api/recommend", {"history": ["x" * 513]})
    assert raised.value.code == 400
    assert "an item id has at most 512" in json.load(raised.value)["error"]


def test_nothing_is_fetched_from_elsewhere(page):
    """The Content-Security-Policy allows the page's own files only, and the page contains no external address."""
    with urllib.request.urlopen(page) as response:
        assert "default-src 'self'" in response.headers["Content-Security-Policy"]
        assert b"http" not in response.read().replace(b"http://www.w3.org/2000/svg", b"")
