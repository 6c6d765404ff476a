"""How a request that fails is answered: one JSON shape, and the HTTP status of each error of the client."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from llamarec_client import (
    ClientError,
    InvalidRequest,
    Overloaded,
    RequestTimeout,
    ServerError,
    ServerUnavailable,
    StepDied,
)

RETRY_AFTER = {"Retry-After": "1"}
"""Header of a refusal that does not concern the request itself: a queue is full for about a ranking pass, and a step
is dead for a few seconds."""


class Failure(BaseModel):
    """Body of every answer that is not a success."""

    error: str = Field(examples=["invalid_request"])
    """Name of the kind of error, for programs."""
    detail: str = Field(examples=["features: TOP_K is 21: ask for 1 to 20, or leave it out for all"])
    """One sentence for people. Clients of Jina's API show this field too."""
    request_id: str = Field(examples=["3f1c0d9a"])
    """Id of the request, as in the servers' logs."""


class Refusal(Exception):  # noqa: N818 - what the caller gets
    """Ends a request with a status and a sentence.

    Args:
        status: HTTP status.
        error: name of the kind of error.
        detail: the sentence.
        headers: further headers.
    """

    def __init__(self, status: int, error: str, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.error, self.detail, self.headers = status, error, detail, dict(headers or {})


class _Kind(NamedTuple):
    error: type[ClientError]
    status: int
    name: str
    again: bool
    """Whether the same request may succeed in a moment."""


_KINDS = (
    _Kind(InvalidRequest, 400, "invalid_request", False),
    _Kind(Overloaded, 503, "overloaded", True),
    _Kind(ServerUnavailable, 503, "unavailable", True),
    _Kind(RequestTimeout, 504, "timeout", False),
    _Kind(StepDied, 503, "step_died", True),
    _Kind(ServerError, 502, "server_error", False),
    _Kind(ClientError, 502, "not_sent", False),
)
"""In this order: a class before its bases."""


def refusal(error: ClientError) -> Refusal:
    """Return how an error of the client is answered."""
    kind = next(kind for kind in _KINDS if isinstance(error, kind.error))
    return Refusal(kind.status, kind.name, str(error), RETRY_AFTER if kind.again else None)


def gateway_error() -> Refusal:
    """Return how a request is answered that failed for a reason of the gateway's own, which only its log tells."""
    return Refusal(500, "gateway_error", "the gateway failed: its log has the reason under the id of the request")


def invalid_body(errors: Sequence[Any]) -> Refusal:
    """Return how a body is answered that has not the shape of the endpoint, from pydantic's list of errors."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return Refusal(400, "invalid_json", "the body is not valid JSON: send a JSON object as UTF-8")
    if not first["loc"]:
        return Refusal(422, "invalid_body", "the body is not a JSON object: send one")
    place = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(errors) - 1} more errors)" if len(errors) > 1 else ""
    message = f"{place[:200]}: {first['msg']}{more}; /openapi.json describes the body"
    return Refusal(422, "invalid_body", message.encode(errors="replace").decode())


def answer(refused: Refusal, request_id: str) -> JSONResponse:
    """Return the response of a request that failed."""
    # A message can quote a caller's text with lone surrogates, which no UTF-8 has.
    detail = refused.detail.encode(errors="replace").decode()
    body = Failure(error=refused.error, detail=detail, request_id=request_id)
    return JSONResponse(body.model_dump(), refused.status, headers=refused.headers)
