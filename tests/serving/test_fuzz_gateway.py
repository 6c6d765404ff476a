"""Generated requests to the gateway in front of the real server: no fault of either, and proper statuses.

`make fuzz` sends 10,000 requests, `make test-more` 300. `tests/llamarec/gateway/test_app.py` has the same requests
without a server.
"""

import os

import pytest
from gateway_bodies import bodies, check_failure
from gateways import open_gateway
from hypothesis import HealthCheck, example, given, settings

from llamarec_client import AsyncRecommenderClient
from serving.server.local import LocalServer

EXAMPLES = int(os.environ.get("FUZZ_REQUESTS", "300"))
GOOD = {"history": ["50", "181"]}
pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def http(repository, tmp_path_factory):
    """Yield an HTTP client of a gateway in front of a server with a store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMAREC_STORE", f"sqlite:///{tmp_path_factory.mktemp('fuzz') / 'store'}")
        with LocalServer(repository) as server, open_gateway(lambda: AsyncRecommenderClient(server.url)) as http:
            yield http


@pytest.fixture(scope="module")
def right(http):
    return http.post("/v1/recommend", json=GOOD).json()["items"]


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(bodies())
@example(("/v1/recommend", b'{"candidates": ["172"], "candidate_titles": ["\\u0000"]}', {}))
@example(("/v1/rerank", b'{"query": "\\n\\r\\n", "documents": ["", ""]}', {}))
def test_any_body_ends_with_a_proper_status(http, right, sent):
    """A success or an error about the request; too late only for those that ask for haste.

    The steps refuse what the gateway lets pass, with the same statuses. A good request gets the same answer afterwards.
    """
    path, content, headers = sent
    answered = http.post(path, content=content, headers=headers)
    assert answered.status_code in {200, 400, 422} | ({504} if "X-Request-Timeout" in headers else set())
    check_failure(answered)
    assert http.post("/v1/recommend", json=GOOD).json()["items"] == right
