"""The web page of `llamarec demo --ui`: build a history, and compare the retriever's list with the ranker's.

It is a small FastAPI application in front of the running server, with three files in ``static/``. It has no build step
and loads nothing from other hosts. (Gradio would need less code, but no current version of it can be installed together
with the pandas and protobuf versions that NVTabular needs.)
"""

import random
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, Field

from llamarec_client.contract import ENSEMBLE, MAX_HISTORY, MAX_ID_BYTES, RETRIEVAL_ENSEMBLE
from llamarec_client.errors import ClientError, InvalidRequest
from llamarec_client.recommender import Recommendations, RecommenderClient
from models.ranker.prompt import PromptBuilder
from preprocessing.catalogue import Catalogue
from preprocessing.data import Data
from preprocessing.errors import InputError
from serving.layout import exported_release, step_artifact
from serving.server.step_times import ensemble_steps, mean_times, step_totals

FILES = Path(__file__).resolve().parent / "static"
SUGGESTIONS = 12
"""Maximum number of titles or users that are suggested during typing."""
PATIENCE = 120.0
"""Timeout of one answer in seconds; a ranking pass on a small machine takes several."""
POLICY = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'"


class Asked(BaseModel):
    """Body of a request for recommendations."""

    history: list[str] = Field(max_length=MAX_HISTORY)
    """Raw ids, oldest first."""


class DemoPage:
    """The page's data: recommendations from the server, the data set's users and titles, and the prompt.

    Args:
        url: gRPC endpoint of the server.
        data: data set of the served models.
        prompts: prompt builder of the exported repository.
        release: id of the export.
    """

    def __init__(self, url: str, data: Data, prompts: PromptBuilder, release: str) -> None:
        self.data = data
        self.client = RecommenderClient(url)
        self._url = url
        self._prompts = prompts
        self._release = release
        self._one_at_a_time = threading.Lock()

    @classmethod
    def open(cls, url: str, repository: Path, data: Data) -> "DemoPage":
        """Connect to the server at ``url``, which serves ``repository``.

        Raises:
            InputError: nothing was exported.
        """
        prompts = PromptBuilder.load(step_artifact(repository, "prompt_builder"))
        return cls(url, data, prompts, exported_release(repository))

    @property
    def catalogue(self) -> Catalogue:
        """Catalogue of the data set."""
        return self.data.catalogue

    def facts(self) -> dict[str, Any]:
        """Return the facts in the header of the page."""
        statistics = self.data.statistics
        return {
            "dataset": self.data.name,
            "users": statistics.users,
            "items": statistics.items,
            "interactions": statistics.interactions,
            "release": self._release,
        }

    def find_items(self, words: str) -> list[dict[str, str]]:
        """Return items that the retriever knows and whose title contains every word, most popular first.

        An item whose raw id is ``words`` comes before them.
        """
        wanted = words.casefold().split()
        counts = self.catalogue.counts
        found = [
            item
            for item in range(1, self.catalogue.trained + 1)
            if wanted and all(word in self.catalogue.title(item).casefold() for word in wanted)
        ]
        found.sort(key=lambda item: -counts[item - 1])
        exact = self.catalogue.number(words.strip().encode())
        if exact is not None:
            found = [exact, *(item for item in found if item != exact)]
        return [self.item(item) for item in found[:SUGGESTIONS]]

    def find_users(self, start: str) -> list[dict[str, Any]]:
        """Return users whose id begins with ``start``; random users if it is empty."""
        if start:
            places = [place for place, user in enumerate(self.data.users) if user.startswith(start)][:SUGGESTIONS]
        else:
            places = random.sample(range(len(self.data.users)), min(SUGGESTIONS, len(self.data.users)))
        return [{"id": self.data.users[place], "items": len(self.data.training[place]) + 1} for place in places]

    def user(self, user: str) -> dict[str, Any]:
        """Return a user's history without the last item, and the last item, which is the paper's test item.

        Raises:
            KeyError: there is no such user.
        """
        try:
            place = self.data.users.index(user)
        except ValueError:
            raise KeyError(user) from None
        history = [*self.data.training[place], self.data.validation[place]]
        return {
            "id": user,
            "history": [self.item(int(item)) for item in history],
            "next": self.item(int(self.data.test[place])),
        }

    def items(self, ids: list[str]) -> list[dict[str, str]]:
        """Return raw ids with their titles; the title of an unknown id is empty."""
        return [self._titled(raw) for raw in ids]

    def recommend(self, history: list[str]) -> dict[str, Any]:
        """Return both lists, the time of each step and the prompt.

        The times of the steps come from the server's statistics; they are exact if it gets no other requests meanwhile.

        Raises:
            ClientError: the server did not answer.
        """
        steps = ensemble_steps(self._url, ENSEMBLE)
        with self._one_at_a_time:
            started = time.perf_counter()
            retrieved = self.client.recommend(history, model=RETRIEVAL_ENSEMBLE, timeout=PATIENCE)
            between = time.perf_counter()
            before = step_totals(self._url, steps)
            asked = time.perf_counter()
            ranked = self.client.recommend(history, timeout=PATIENCE, fallback="retriever")
            ended = time.perf_counter()
            times = mean_times(before, step_totals(self._url, steps))
        text, tokens = self._prompt(history, retrieved)
        return {
            "retrieved": self._rows(retrieved),
            "ranked": self._rows(ranked),
            "degraded": ranked.degraded,
            "request_id": ranked.request_id,
            "unknown": [raw for raw in history if not self._known(raw)],
            "milliseconds": {"retriever alone": (between - started) * 1e3, "all": (ended - asked) * 1e3},
            "steps": {step: times[step]._asdict() for step in steps},
            "prompt": text,
            "tokens": tokens,
        }

    def item(self, item: int) -> dict[str, str]:
        """Return id and title of an item number."""
        return {"id": self.catalogue.raw(item).decode(), "title": self.catalogue.title(item)}

    def _known(self, raw: str) -> int | None:
        number = self.catalogue.number(raw.encode())
        return number if number is not None and number <= self.catalogue.trained else None

    def _titled(self, raw: str) -> dict[str, str]:
        return {"id": raw, "title": self.catalogue.title_of(raw)}

    def _rows(self, answer: Recommendations) -> list[dict[str, Any]]:
        return [{**self._titled(r.item_id), "score": r.score, "retriever_rank": r.retriever_rank} for r in answer]

    def _prompt(self, history: list[str], retrieved: Recommendations) -> tuple[str, int]:
        """Return the prompt, built with the same files and function as in the server, and its number of tokens."""
        if not retrieved:
            return "", 0
        known = [item for raw in history if (item := self._known(raw)) is not None]
        candidates = [item for r in retrieved if (item := self._known(r.item_id)) is not None]
        text, prompt = self._prompts.fit(known, candidates)
        return text, len(prompt.tokens)


def create_app(demo: DemoPage) -> FastAPI:
    """Return the application: the page and the API that it calls."""
    app = FastAPI(title="LlamaRec", docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def add_policy(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        return response

    @app.exception_handler(ClientError)
    async def say(request: Request, error: ClientError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 400 if isinstance(error, InvalidRequest) else 503)

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(FILES / "index.html")

    @app.get("/api/facts")
    def facts() -> dict[str, Any]:
        return demo.facts()

    @app.get("/api/items")
    def items(item: Annotated[list[str] | None, Query()] = None, q: str = "") -> list[dict[str, str]]:
        return demo.items(item[:MAX_HISTORY]) if item else demo.find_items(q[:MAX_ID_BYTES])

    @app.get("/api/users")
    def users(q: str = "") -> list[dict[str, Any]]:
        return demo.find_users(q)

    @app.get("/api/users/{user:path}")
    def user(user: str) -> dict[str, Any]:
        try:
            return demo.user(user)
        except KeyError:
            raise HTTPException(404, f"there is no user {user!r}") from None

    @app.post("/api/recommend")
    def recommend(asked: Asked) -> dict[str, Any]:
        return demo.recommend(asked.history)

    app.mount("/page", StaticFiles(directory=FILES), name="page")
    return app


def show(demo: DemoPage, port: int) -> None:
    """Serve the page on the loopback interface until it is interrupted.

    Raises:
        InputError: the port is taken.
    """
    # uvicorn's own logging configuration would close the existing handlers, and with absl's handler its stream.
    settings = uvicorn.Config(create_app(demo), host="127.0.0.1", port=port, log_level="warning", log_config=None)
    try:
        socket = settings.bind_socket()
    except SystemExit:
        raise InputError(f"port {port} is in use or not allowed: give another --ui-port") from None
    uvicorn.Server(settings).run(sockets=[socket])
