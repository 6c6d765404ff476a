"""The gateway's endpoints: each turns a body into one call of the asyncio client, and its answer into JSON."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response, Security
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from llamarec.gateway.admission import Admission, Turn
from llamarec.gateway.bodies import (
    EventsAnswer,
    EventsBody,
    Item,
    Neighbour,
    RecommendAnswer,
    RecommendBody,
    SimilarAnswer,
    SimilarBody,
)
from llamarec.gateway.errors import Failure, Refusal, answer, gateway_error, invalid_body, refusal
from llamarec.gateway.keys import ApiKeys
from llamarec.gateway.metrics import Metrics
from llamarec.gateway.options import GatewayOptions
from llamarec.gateway.rerank import RerankAnswer, RerankAnswer2, RerankBody, answer_1, answer_2
from llamarec_client import AsyncRecommenderClient, ClientError, Recommendations
from llamarec_client.contract import RETRIEVAL_ENSEMBLE

Body = TypeVar("Body", bound=BaseModel)
READY_SECONDS = 1.0
"""How long an answer of ``/health/ready`` is valid, so that probes cannot load the servers; also its deadline."""
DESCRIPTION = (
    "JSON over HTTP in front of LlamaRec servers. Every answer has the header `X-Request-ID`, which a request can give;"
    " `X-Request-Timeout` shortens the deadline, in seconds."
)
FAILURES: dict[int | str, dict[str, Any]] = {
    400: {"model": Failure, "description": "The request is invalid; the detail says why."},
    401: {"model": Failure, "description": "The API key is missing or wrong."},
    413: {"model": Failure, "description": "The body is too large."},
    422: {"model": Failure, "description": "The body has not the shape of this endpoint."},
    429: {"model": Failure, "description": "Too many requests are in flight at the gateway."},
    502: {"model": Failure, "description": "A server failed."},
    503: {"model": Failure, "description": "No server can answer now, or the ranker's queue is full."},
    504: {"model": Failure, "description": "There was no answer before the deadline."},
}
GUARDED: dict[str, Any] = {
    "responses": FAILURES,
    # Only describes the key in OpenAPI; the admission checks it.
    "dependencies": [Security(HTTPBearer(auto_error=False, description="An API key, if the gateway has any."))],
}


class Gateway:
    """The client of the servers, and what the endpoints do with it.

    Args:
        connect: opens the client; called once there is an event loop.
        metrics: where answers of the fallback are counted.
    """

    def __init__(self, connect: Callable[[], AsyncRecommenderClient], metrics: Metrics) -> None:
        self._connect, self._metrics = connect, metrics
        self._client: AsyncRecommenderClient | None = None
        self._checked, self._failure = -READY_SECONDS, "no server has been asked yet"

    @property
    def client(self) -> AsyncRecommenderClient:
        """The client, opened at the first use."""
        if self._client is None:
            client = self._client = self._connect()
            self._metrics.mixed_releases.set_function(lambda: client.mixed_releases)
        return self._client

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.close()

    async def recommend(self, turn: Turn, arguments: dict[str, Any]) -> Recommendations:
        """Return the servers' answer.

        Raises:
            ClientError: there is no answer.
        """
        ranked = await self.client.recommend(**arguments, timeout=turn.seconds(), request_id=turn.request_id)
        if ranked.degraded:
            self._metrics.degraded.inc()
        return ranked

    async def similar(self, turn: Turn, asked: SimilarBody) -> list[Neighbour]:
        """Return the neighbours of an item.

        Raises:
            ClientError: there is no answer.
        """
        found = await self.client.similar(
            asked.item_id, top_k=asked.top_k, timeout=turn.seconds(), request_id=turn.request_id
        )
        return [
            Neighbour(item_id=each.item_id, score=each.score, transitions=each.transitions, titles=each.titles)
            for each in found
        ]

    async def why_not_ready(self) -> str:
        """Return why no server answers; empty if one does.

        One request to the retriever shows it, at most once a second.
        """
        now = time.monotonic()
        if now - self._checked >= READY_SECONDS:
            self._checked = now
            try:
                await self.client.recommend([], top_k=1, model=RETRIEVAL_ENSEMBLE, timeout=READY_SECONDS)
                self._failure = ""
            except ClientError as error:
                self._failure = str(error)
        return self._failure


def _takes(body: type[BaseModel]) -> dict[str, Any]:
    """Return OpenAPI's description of a body, which :func:`_read` reads."""
    schema = body.model_json_schema()
    whole = _with_shapes(schema, schema.pop("$defs", {}))
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": whole}}}}


def _with_shapes(schema: Any, shapes: dict[str, Any]) -> Any:
    """Return a schema in which the shapes stand in the place of their names, of which FastAPI knows only answers'."""
    if isinstance(schema, list):
        return [_with_shapes(part, shapes) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _with_shapes(shapes[schema["$ref"].rsplit("/", 1)[1]], shapes)
    return {name: _with_shapes(part, shapes) for name, part in schema.items()}


async def _read(request: Request, body: type[Body]) -> Body:
    """Return a request's body, whatever its Content-Type is; FastAPI's own way treats a body of another type as text.

    Raises:
        Refusal: it is not valid JSON, or has not the shape of the endpoint.
    """
    try:
        return body.model_validate_json(await request.body())
    except ValidationError as error:
        raise invalid_body(error.errors(include_url=False, include_context=False, include_input=False)) from None


def _json(body: BaseModel) -> Response:
    """Return a response without FastAPI's validation of what was just built."""
    return Response(body.model_dump_json(exclude_none=True), media_type="application/json")


def create_app(
    options: GatewayOptions,
    keys: ApiKeys,
    connect: Callable[[], AsyncRecommenderClient],
    page: ASGIApp | None = None,
) -> Admission:
    """Return the application behind its admission.

    Args:
        options: limits and deadline.
        keys: keys of the callers.
        connect: opens the client of the servers.
        page: the demo's page, which answers all paths that are not the gateway's, without keys and limits.
    """
    metrics = Metrics()
    gateway = Gateway(connect, metrics)

    @asynccontextmanager
    async def connected(app: FastAPI) -> AsyncIterator[None]:
        yield
        await gateway.close()

    app = FastAPI(title="LlamaRec gateway", description=DESCRIPTION, docs_url=None, redoc_url=None, lifespan=connected)
    add_failures(app)
    add_recommender(app, gateway)
    add_rerankers(app, gateway)
    admission = Admission(app, options=options, keys=keys, metrics=metrics)
    add_operations(app, gateway, admission, metrics)
    if page is not None:
        app.mount("/", page)
    return admission


def _turn(request: Request) -> Turn:
    turn: Turn = request.state.turn
    return turn


def add_failures(app: FastAPI) -> None:
    """Add the answers of requests that fail."""

    def request_id(request: Request) -> str:
        return request.state.turn.request_id if hasattr(request.state, "turn") else ""

    @app.exception_handler(ClientError)
    async def failed(request: Request, error: ClientError) -> JSONResponse:
        return answer(refusal(error), request_id(request))

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> JSONResponse:
        return answer(error, request_id(request))

    @app.exception_handler(Exception)
    async def faulty(request: Request, error: Exception) -> JSONResponse:
        return answer(gateway_error(), request_id(request))  # Starlette raises it again, and the admission logs it

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        names = {404: "not_found", 405: "method_not_allowed"}
        details = {
            404: "there is no such path: /openapi.json lists all of them",
            405: "this path takes another method: /openapi.json lists it",
        }
        code = error.status_code
        refused = Refusal(code, names.get(code, "failed"), details.get(code, str(error.detail)), error.headers)
        return answer(refused, request_id(request))


def add_recommender(app: FastAPI, gateway: Gateway) -> None:
    """Add the endpoints of the recommender's own API."""

    @app.post(
        "/v1/recommend",
        openapi_extra=_takes(RecommendBody),
        response_model=RecommendAnswer,
        **GUARDED,
        summary="Recommend items, or rank candidates",
    )
    async def recommend(request: Request) -> Response:
        asked = await _read(request, RecommendBody)
        arguments = {name: value for name, value in asked if value is not None}
        if asked.policy is not None:
            arguments["policy"] = asked.policy.policy()
        ranked = await gateway.recommend(_turn(request), arguments)
        items = [Item(item_id=row.item_id, score=row.score, retriever_rank=row.retriever_rank) for row in ranked]
        return _json(
            RecommendAnswer(items=items, model=ranked.model, degraded=ranked.degraded, request_id=ranked.request_id)
        )

    @app.post(
        "/v1/events",
        openapi_extra=_takes(EventsBody),
        response_model=EventsAnswer,
        **GUARDED,
        summary="Record what a user did",
    )
    async def events(request: Request) -> Response:
        turn, asked = _turn(request), await _read(request, EventsBody)
        new = await gateway.client.record(
            asked.user_id,
            asked.item_ids,
            timestamps=asked.timestamps,
            kinds=asked.kinds,
            timeout=turn.seconds(),
            request_id=turn.request_id,
        )
        return _json(EventsAnswer(new=new, request_id=turn.request_id))

    @app.post(
        "/v1/similar",
        openapi_extra=_takes(SimilarBody),
        response_model=SimilarAnswer,
        **GUARDED,
        summary="Find the items that are nearest to one",
    )
    async def similar(request: Request) -> Response:
        turn, asked = _turn(request), await _read(request, SimilarBody)
        return _json(SimilarAnswer(items=await gateway.similar(turn, asked), request_id=turn.request_id))


def add_rerankers(app: FastAPI, gateway: Gateway) -> None:
    """Add the endpoints of Jina's and Cohere's rerank APIs."""

    @app.post(
        "/v1/rerank",
        openapi_extra=_takes(RerankBody),
        **GUARDED,
        response_model=RerankAnswer,
        summary="Rank documents, as Jina's API and version 1 of Cohere's",
    )
    async def rerank(request: Request) -> Response:
        asked = await _read(request, RerankBody)
        return _json(answer_1(asked, await gateway.recommend(_turn(request), asked.arguments())))

    @app.post(
        "/v2/rerank",
        openapi_extra=_takes(RerankBody),
        response_model=RerankAnswer2,
        **GUARDED,
        summary="Rank documents, as version 2 of Cohere's API",
    )
    async def rerank_2(request: Request) -> Response:
        asked = await _read(request, RerankBody)
        return _json(answer_2(asked, await gateway.recommend(_turn(request), asked.arguments())))


def add_operations(app: FastAPI, gateway: Gateway, admission: Admission, metrics: Metrics) -> None:
    """Add what operators ask: health and metrics."""

    @app.get("/health/live", summary="Whether the gateway runs", response_class=PlainTextResponse)
    async def live() -> str:
        return "alive\n"

    @app.get("/health/ready", summary="Whether a server answers", response_class=PlainTextResponse)
    async def ready() -> PlainTextResponse:
        reason = "the gateway is stopping" if admission.draining else await gateway.why_not_ready()
        return PlainTextResponse(f"{reason or 'ready'}\n", 503 if reason else 200)

    @app.get("/metrics", include_in_schema=False)
    async def measured() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
