"""The web page of `llamarec demo --ui`: build a history, and compare the retriever's list with the ranker's.

Where the server has a store, what is chosen on the page is recorded, and items can be added and hidden.

It is a small FastAPI application in front of the running server, with three files in ``static/``. It has no build step
and loads nothing from other hosts. (Gradio would need less code, but no current version of it can be installed together
with the pandas and protobuf versions that NVTabular needs.)
"""

import math
import random
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from llamarec.page.live_store import LiveStore
from llamarec.web import listen, web_server
from llamarec_client.contract import ENSEMBLE, MAX_EVENTS, MAX_HISTORY, MAX_ID_BYTES, RETRIEVAL_ENSEMBLE
from llamarec_client.errors import ClientError, InvalidRequest
from llamarec_client.recommender import Recommendations, RecommenderClient
from models.ranker.prompt import PromptBuilder
from preprocessing.catalogue import Catalogue
from preprocessing.data import Data
from preprocessing.errors import InputError
from preprocessing.features import FeatureEncoder
from serving.layout import exported_release, step_artifact
from serving.server.step_times import ensemble_steps, mean_times, step_totals
from stores.store import Listing, StoreError

FILES = Path(__file__).resolve().parent / "static"
SUGGESTIONS = 12
"""Maximum number of titles or users that are suggested during typing."""
PATIENCE = 120.0
"""Timeout of one answer in seconds; a ranking pass on a small machine takes several."""
POLICY = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'"


Visitor = Annotated[str, Field(min_length=1, max_length=64)]
"""Id under which the store keeps what somebody chose on the page."""
Id = Annotated[str, Field(max_length=MAX_ID_BYTES)]


class Asked(BaseModel):
    """Body of a request for recommendations: by a history, or by a visitor whose history is in the store."""

    history: list[str] | None = Field(None, max_length=MAX_HISTORY)
    """Raw ids, oldest first."""
    visitor: Visitor | None = None


class Chosen(BaseModel):
    """Body of a request to record what a visitor chose."""

    visitor: Visitor
    items: list[Id] = Field(max_length=MAX_EVENTS)
    """Raw ids, oldest first."""
    anew: bool = False
    """Whether the visitor's earlier choices are forgotten."""


class NewItem(BaseModel):
    """Body of a request to add an item."""

    title: str = Field(max_length=200)


class Visibility(BaseModel):
    """Body of a request to hide an item, or to show it again."""

    item: Id
    hidden: bool


class Known(NamedTuple):
    """What the page knows of the items at this moment."""

    catalogue: Catalogue
    features: FeatureEncoder
    prompts: PromptBuilder

    def with_items(self, listing: Listing) -> "Known":
        """Return the same with added and hidden items."""
        return Known(
            self.catalogue.with_added(listing.added),
            self.features.with_items(listing.added, listing.hidden),
            self.prompts.with_added(listing.added),
        )


class DemoPage:
    """The page's data: recommendations from the server, the data set's users and titles, and the prompt.

    Args:
        url: gRPC endpoint of the server.
        data: data set of the served models.
        exported: what the exported files say of the items.
        release: id of the export.
        store: the server's store; None if it has none.
    """

    def __init__(self, url: str, data: Data, exported: Known, release: str, store: LiveStore | None = None) -> None:
        self.data = data
        self.client = RecommenderClient(url)
        self.store = store
        self._url = url
        self._exported = self._known = exported
        self._revision: int | None = None
        self._release = release
        self._one_at_a_time = threading.Lock()

    @classmethod
    def open(cls, url: str, repository: Path, data: Data, store: str | None = None) -> "DemoPage":
        """Connect to the server at ``url``, which serves ``repository`` with the store at an address, if any.

        Raises:
            InputError: nothing was exported.
        """
        features = FeatureEncoder.load(step_artifact(repository, "features"), data.catalogue)
        prompts = PromptBuilder.load(step_artifact(repository, "prompt_builder"))
        live = LiveStore(store, data.name) if store else None
        return cls(url, data, Known(data.catalogue, features, prompts), exported_release(repository), live)

    @property
    def known(self) -> Known:
        """What is known of the items at this moment."""
        if self.store is not None:
            with self._one_at_a_time:
                listing = self.store.listing(self._revision)
                if listing is not None:
                    self._revision, self._known = listing.revision, self._exported.with_items(listing)
        return self._known

    @property
    def catalogue(self) -> Catalogue:
        """Catalogue of the data set, with the items that were added since."""
        return self.known.catalogue

    def facts(self) -> dict[str, Any]:
        """Return the facts in the header of the page."""
        statistics = self.data.statistics
        return {
            "dataset": self.data.name,
            "users": statistics.users,
            "items": statistics.items,
            "interactions": statistics.interactions,
            "release": self._release,
            "store": self.store is not None,
        }

    def find_items(self, words: str) -> list[dict[str, str]]:
        """Return trained and added items whose title contains every word: added ones first, then by popularity.

        An item whose raw id is ``words`` comes before them. Hidden items are left out.
        """
        wanted = words.casefold().split()
        known = self.known
        catalogue, hidden = known.catalogue, known.features.hidden
        added = range(len(self.data.catalogue) + 1, len(catalogue) + 1)
        found = [
            item
            for item in (*added, *range(1, catalogue.trained + 1))
            if wanted and item not in hidden and all(word in catalogue.title(item).casefold() for word in wanted)
        ]
        found.sort(key=lambda item: -catalogue.counts[item - 1] if item <= catalogue.trained else -math.inf)
        exact = catalogue.number(words.strip().encode())
        if exact is not None and exact not in hidden:
            found = [exact, *(item for item in found if item != exact)]
        return [_item(catalogue, item) for item in found[:SUGGESTIONS]]

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
            "history": [_item(self.data.catalogue, int(item)) for item in history],
            "next": _item(self.data.catalogue, int(self.data.test[place])),
        }

    def items(self, ids: list[str]) -> list[dict[str, str]]:
        """Return raw ids with their titles; the title of an unknown id is empty."""
        catalogue = self.catalogue
        return [_titled(catalogue, raw) for raw in ids]

    def record(self, chosen: Chosen) -> list[dict[str, str]]:
        """Record what a visitor chose, and return the visitor's whole history.

        Raises:
            ClientError: the server did not record it.
            StoreError: the store cannot be reached.
        """
        assert self.store is not None
        if chosen.anew:
            self.store.forget(chosen.visitor)
        if chosen.items:
            self.client.record(chosen.visitor, chosen.items)
        return self.items(self.store.history(chosen.visitor))

    def recommend(self, asked: Asked) -> dict[str, Any]:
        """Return both lists, the time of each step and the prompt.

        The times of the steps come from the server's statistics; they are exact if it gets no other requests meanwhile.

        Raises:
            ClientError: the server did not answer.
        """
        steps = ensemble_steps(self._url, ENSEMBLE)
        history = asked.history or []
        by: dict[str, Any] = {"history": history}
        if asked.visitor is not None and self.store is not None:
            history, by = self.store.history(asked.visitor), {"user_id": asked.visitor}
        known = self.known
        with self._one_at_a_time:
            started = time.perf_counter()
            retrieved = self.client.recommend(**by, model=RETRIEVAL_ENSEMBLE, timeout=PATIENCE)
            between = time.perf_counter()
            before = step_totals(self._url, steps)
            again = time.perf_counter()
            ranked = self.client.recommend(**by, timeout=PATIENCE, fallback="retriever")
            ended = time.perf_counter()
            times = mean_times(before, step_totals(self._url, steps))
        read = known.features.encode([raw.encode() for raw in history]).history
        text, tokens = _prompt(known, read, retrieved)
        return {
            "retrieved": _rows(known.catalogue, retrieved),
            "ranked": _rows(known.catalogue, ranked),
            "degraded": ranked.degraded,
            "request_id": ranked.request_id,
            "unknown": [raw for raw in history if known.catalogue.number(raw.encode()) not in read],
            "milliseconds": {"retriever alone": (between - started) * 1e3, "all": (ended - again) * 1e3},
            "steps": {step: times[step]._asdict() for step in steps},
            "prompt": text,
            "tokens": tokens,
        }


def _item(catalogue: Catalogue, item: int) -> dict[str, str]:
    return {"id": catalogue.raw(item).decode(), "title": catalogue.title(item)}


def _titled(catalogue: Catalogue, raw: str) -> dict[str, str]:
    return {"id": raw, "title": catalogue.title_of(raw)}


def _rows(catalogue: Catalogue, answer: Recommendations) -> list[dict[str, Any]]:
    return [{**_titled(catalogue, r.item_id), "score": r.score, "retriever_rank": r.retriever_rank} for r in answer]


def _prompt(known: Known, history: NDArray[np.int32], retrieved: Recommendations) -> tuple[str, int]:
    """Return the prompt, built with the same files and function as in the server, and its number of tokens."""
    numbers = (known.catalogue.number(r.item_id.encode()) for r in retrieved)
    candidates = [item for item in numbers if item is not None]
    if not candidates:
        return "", 0
    text, prompt = known.prompts.fit(history, candidates)
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

    @app.exception_handler(StoreError)
    @app.exception_handler(InputError)
    async def say_of_items(request: Request, error: StoreError | InputError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 400 if isinstance(error, InputError) else 503)

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
        return demo.recommend(asked)

    if demo.store is not None:
        add_changes(app, demo, demo.store)
    app.mount("/page", StaticFiles(directory=FILES), name="page")
    return app


def add_changes(app: FastAPI, demo: DemoPage, store: LiveStore) -> None:
    """Add what changes the store: a visitor's choices, and items that are added and hidden."""

    @app.get("/api/visitors/{visitor}")
    def history(visitor: Visitor) -> list[dict[str, str]]:
        return demo.items(store.history(visitor))

    @app.post("/api/events")
    def record(chosen: Chosen) -> list[dict[str, str]]:
        return demo.record(chosen)

    @app.post("/api/items")
    def add(new: NewItem) -> dict[str, str]:
        return store.add_item(new.title)

    @app.get("/api/hidden")
    def hidden() -> list[dict[str, str]]:
        return demo.items(store.hidden())

    @app.post("/api/hidden")
    def hide(asked: Visibility) -> list[dict[str, str]]:
        store.set_hidden(asked.item, hidden=asked.hidden)
        return demo.items(store.hidden())


def show(demo: DemoPage, port: int) -> None:
    """Serve the page on the loopback interface until it is interrupted.

    Raises:
        InputError: the port is taken.
    """
    settings = web_server(create_app(demo), "127.0.0.1", port)
    uvicorn.Server(settings).run(sockets=[listen(settings, "--ui-port")])
