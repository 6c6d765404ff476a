"""Generated requests to the gateway, and what every answer to one has to be."""

import json
from typing import Any

from gateways import FAILURE
from hypothesis import strategies as st

from llamarec.gateway.bodies import EventsBody, RecommendBody, SimilarBody
from llamarec_client.contract import POLICY_FIELDS

PATHS = ("/v1/recommend", "/v1/events", "/v1/similar", "/v1/rerank", "/v2/rerank")
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(exclude_categories=[]), max_size=8)
    | st.sampled_from(["llamarec", "llamarec/ids", "retriever", "50"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["text", "x", ""]), inner, max_size=2),
    max_leaves=10,
)
any_text = st.text(st.characters(exclude_categories=[]), max_size=5)
texts = st.lists(any_text, max_size=4)
ids = st.lists(st.sampled_from(["50", "181", "172", "258", "no such item"]) | any_text, max_size=6)
fields = {
    **dict.fromkeys(("history", "candidates", "exclude", "item_ids"), ids | texts | values),
    **dict.fromkeys(("history_titles", "candidate_titles", "kinds", "timestamps"), texts | values),
    "documents": ids | texts | values,
    "query": st.sampled_from(["50\n181", "Heat\nFargo"]) | any_text | values,
    **{name: st.sampled_from(["50", "181"]) | any_text | values for name in ("user_id", "item_id")},
    **{name: st.integers(-2, 30) | values for name in ("top_k", "top_n")},
    "model": st.sampled_from(["llamarec", "llamarec/ids", "llamarec_retrieval"]) | values,
    "policy": st.fixed_dictionaries({}, optional=dict.fromkeys(POLICY_FIELDS, values)) | values,
    "fallback": st.just("retriever") | values,
    "return_documents": st.booleans() | values,
}
OWN = {
    "/v1/recommend": RecommendBody.model_fields,
    "/v1/events": EventsBody.model_fields,
    "/v1/similar": SimilarBody.model_fields,
    "/v1/rerank": ("query", "documents", "model", "top_n", "return_documents"),
    "/v2/rerank": ("query", "documents", "model", "top_n"),
}


KNOWN = st.sampled_from(["50", "181", "172", "258", "8", "100"])
TITLES = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), min_size=1, max_size=5)
PROPER = {
    **dict.fromkeys(("history", "exclude", "item_ids"), st.lists(KNOWN, max_size=5)),
    **dict.fromkeys(("candidates", "documents"), st.lists(KNOWN, min_size=1, max_size=5, unique=True)),
    **dict.fromkeys(("item_id", "user_id"), KNOWN),
    **dict.fromkeys(("top_k", "top_n"), st.integers(1, 6)),
    "query": st.lists(KNOWN, max_size=4).map("\n".join),
    "model": st.just("llamarec"),
    "fallback": st.just("retriever"),
    "return_documents": st.booleans(),
}
"""Values that the endpoints accept."""
NEEDED = {
    "/v1/recommend": ("history",),
    "/v1/events": ("user_id", "item_ids"),
    "/v1/similar": ("item_id",),
    "/v1/rerank": ("query", "documents"),
    "/v2/rerank": ("query", "documents"),
}


@st.composite
def proper(draw, path):
    """Draw a body that the endpoint accepts."""
    needed = {name: PROPER[name] for name in NEEDED[path]}
    more = {name: PROPER[name] for name in OWN[path] if name in PROPER and name not in needed}
    body = draw(st.fixed_dictionaries(needed, optional=more))
    if "documents" in body and draw(st.booleans()):
        body["documents"], body["query"] = draw(TITLES), "\n".join(draw(TITLES))
    elif "documents" in body:
        body["model"] = "llamarec/ids"
    return body


@st.composite
def bodies(draw):
    """Draw an endpoint with a body: a proper one, one with a wrong or strange field, or anything at all."""
    path = draw(st.sampled_from(PATHS))
    body = draw(proper(path))
    kind = draw(st.integers(0, 9))
    if kind >= 4:
        name = draw(st.sampled_from(sorted(OWN[path])))
        body[name] = draw(fields[name])
    if kind == 9:
        own = {name: fields[name] for name in OWN[path]}
        body = draw(st.fixed_dictionaries({}, optional=own) | st.dictionaries(st.text(max_size=5), values) | values)
    content = draw(st.binary(max_size=50)) if kind == 8 else json.dumps(body).encode()
    headers = {"Content-Type": draw(st.sampled_from(["application/json"] * 9 + ["text/plain"]))}
    for name in ("X-Request-ID", "X-Request-Timeout"):
        if not draw(st.integers(0, 9)):
            headers[name] = draw(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=5)).strip()
    return path, content, headers


def check_failure(answered: Any) -> None:
    """Check that an answer has a request id, and the one JSON shape with a detail if it is no success."""
    request_id = answered.headers["X-Request-ID"]
    assert request_id
    if answered.status_code != 200:
        assert set(answered.json()) == FAILURE
        assert answered.json()["request_id"] == request_id
        assert answered.json()["detail"]
