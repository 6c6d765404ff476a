"""A gateway in this process, in front of a client that records its calls and answers without a server."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.testclient import TestClient

from llamarec.gateway.app import create_app
from llamarec.gateway.keys import ApiKeys
from llamarec.gateway.options import GatewayOptions
from llamarec.web import listen, web_server
from llamarec_client import Recommendation, Recommendations, Request
from llamarec_client.messages import event_inputs

FAILURE = {"error", "detail", "request_id"}
"""Fields of every answer that is not a success."""


@dataclass(frozen=True)
class SimilarItem:
    item_id: str
    score: float
    transitions: float
    titles: float


class FakeClient:
    """Has the methods of the asyncio client. Candidates, or their places if they are titles, come back reversed."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.error: Exception | None = None
        self.closed = False
        self.mixed_releases = 0

    async def _called(self, method: str, arguments: dict[str, Any]) -> None:
        self.calls.append((method, arguments))
        if self.error is not None:
            raise self.error

    async def recommend(
        self,
        history=None,
        *,
        history_titles=None,
        exclude=None,
        candidates=None,
        candidate_titles=None,
        top_k=None,
        user_id=None,
        policy=None,
        model="llamarec",
        timeout=30.0,
        fallback=None,
        request_id=None,
    ) -> Recommendations:
        await self._called("recommend", {name: value for name, value in locals().items() if name != "self"})
        # The arguments are checked as the real client checks them.
        given = history if history is not None or history_titles is None else []
        Request(given, exclude, candidates, top_k, user_id, policy=policy).inputs()
        ids = candidates
        if ids is None:
            ids = ["a", "b", "c"] if candidate_titles is None else map(str, range(len(candidate_titles)))
        ids = list(ids)[::-1]
        rows = [Recommendation(item, 1.0 / (rank + 2), rank + 1) for rank, item in enumerate(ids)]
        return Recommendations(rows[:top_k], model=model, degraded=False, request_id=request_id or "new")

    async def record(self, user_id, item_ids, *, timestamps=None, kinds=None, timeout=30.0, request_id=None) -> int:
        await self._called("record", {name: value for name, value in locals().items() if name != "self"})
        event_inputs(user_id, item_ids, timestamps, kinds)
        return len(item_ids)

    async def similar(self, item_id, top_k=10, *, timeout=None, request_id=None) -> list[SimilarItem]:
        await self._called("similar", {name: value for name, value in locals().items() if name != "self"})
        return [SimilarItem("181", 0.75, 0.5, 1.0)][:top_k]

    async def close(self) -> None:
        self.closed = True


@contextmanager
def listening_gateway(client: Any, keys: ApiKeys | None = None) -> Iterator[str]:
    """Yield the address of a gateway that listens on a port, in a thread."""
    connect = client if callable(client) else lambda: client
    settings = web_server(create_app(GatewayOptions(), keys or ApiKeys(), connect), "127.0.0.1", 0)
    bound, server = listen(settings, "--port"), uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    server.should_exit = True
    thread.join()


@contextmanager
def open_gateway(client: Any, keys: ApiKeys | None = None, **options: Any) -> Iterator[TestClient]:
    """Yield an HTTP client of a gateway in front of ``client``, or of what a function opens in the event loop."""
    connect = client if callable(client) else lambda: client
    app = create_app(GatewayOptions(**options), keys or ApiKeys(), connect)
    with TestClient(app, raise_server_exceptions=False) as http:
        yield http
