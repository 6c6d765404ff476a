"""The requests of the soak test, sent from separate processes, and the ways in which it disturbs connections."""

import asyncio
import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from typing import Any

import aiohttp
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.settings import SettingCodes, Settings
from tritonclient.grpc import service_pb2

from llamarec_client.errors import ClientError, InvalidRequest, Overloaded, RequestTimeout
from llamarec_client.recommender import AsyncRecommenderClient, RecommenderClient

DEADLINE = 20.0
HURRY = 0.1
"""Share of requests with a deadline that a busy server often misses, and of those that their caller cancels."""
SOON = 0.2
"""Maximum seconds of such a deadline, and until such a cancellation."""
THREADS = 16
"""Threads of the synchronous client, which are enough for its share of the requests."""
Rows = list[tuple[Any, ...]]


@dataclass(frozen=True)
class Question:
    """A request with its correct answers."""

    arguments: Mapping[str, Any]
    """Those of the client's method."""
    right: Mapping[str, list[Rows]]
    """For each release the correct answer, by ``ranker`` and ``retriever``; if empty, the request is invalid."""
    method: str = "recommend"


@dataclass
class Answer:
    """What came of a request."""

    rows: Rows = field(default_factory=list)
    degraded: bool = False
    error: str = ""
    """Name of the error's class; empty if there is an answer."""
    text: str = ""


def kind(question: Question, answer: Answer, *, hurried: bool) -> str:
    """Return the outcome of a request.

    Args:
        question: the request.
        answer: what came of it.
        hurried: whether its deadline was so short that it may pass.
    """
    if answer.error == InvalidRequest.__name__:
        return "refused as bad input" if not question.right["ranker"] else "wrong"
    if answer.error == Overloaded.__name__:
        return "refused"
    if answer.error:
        return "out of time" if hurried and answer.error == RequestTimeout.__name__ else "failed"
    if answer.rows not in question.right["retriever" if answer.degraded else "ranker"]:
        return "wrong"
    return "degraded" if answer.degraded else "answered"


@dataclass(frozen=True)
class Order:
    """What a sender has to do; it is passed to another process."""

    questions: Sequence[Question]
    rate: float
    """Requests per second."""
    seconds: float
    seed: int


class Sender:
    """Sends requests at random moments, some of them in a hurry, and counts what comes of them."""

    def __init__(self, order: Order) -> None:
        self.questions, self.rate, self.seconds = order.questions, order.rate, order.seconds
        self.counts: Counter[str] = Counter()
        self.failures: list[tuple[float, float, str]] = []
        self._chance = random.Random(order.seed)
        self._lock = threading.Lock()

    def draw(self) -> tuple[Question, str | None, float]:
        """Return the next request, its fallback and its deadline."""
        with self._lock:
            self.counts["sent"] += 1
            question = self.questions[self._chance.randrange(len(self.questions))]
            hurried = self._chance.random() < HURRY
            fallback = "retriever" if question.method == "recommend" and self._chance.random() < 0.5 else None
            return question, fallback, self._chance.uniform(0.001, SOON) if hurried else DEADLINE

    def pause(self, share: float = 1.0) -> float:
        """Return the seconds until the next request of one of ``1 / share`` senders."""
        with self._lock:
            return self._chance.expovariate(self.rate * share)

    def note(self, question: Question, answer: Answer, timeout: float, began: float) -> None:
        """Count the outcome of a request."""
        became = kind(question, answer, hurried=timeout <= SOON)
        with self._lock:
            self.counts[became] += 1
            if became in ("failed", "wrong"):
                text = f"{became} {answer.error or answer.rows[:2]}: {answer.text:.300} {question.arguments!s:.150}"
                self.failures.append((began, time.time(), text))

    async def send(self, ask: Callable[[Question, str | None, float], Awaitable[Answer]]) -> None:
        """Send with a coroutine until the time is over (open loop); some requests are cancelled."""
        under_way: set[asyncio.Task[None]] = set()

        async def one() -> None:
            question, fallback, timeout = self.draw()
            began = time.time()
            work = asyncio.ensure_future(ask(question, fallback, timeout))
            if self._chance.random() < HURRY:
                done, _ = await asyncio.wait({work}, timeout=self._chance.uniform(0, SOON))
                if not done:
                    work.cancel()
                    await asyncio.wait({work})
                    self.counts["cancelled"] += 1
                    return
            self.note(question, await work, timeout, began)

        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            task = asyncio.create_task(one())
            under_way.add(task)
            task.add_done_callback(under_way.discard)
            await asyncio.sleep(self.pause())
        await asyncio.gather(*under_way)

    def result(self) -> tuple[Counter[str], list[tuple[float, float, str]]]:
        """Return the counts, and of each failure when it began and ended, and its text."""
        return self.counts, self.failures


def _answer_of(question: Question, found: Any) -> Answer:
    if question.method == "similar":
        return Answer([astuple(row) for row in found])
    return Answer([(row.item_id, row.score, row.retriever_rank) for row in found], found.degraded)


def _arguments(question: Question, fallback: str | None, timeout: float) -> dict[str, Any]:
    given = {**question.arguments, "timeout": timeout}
    return {**given, "fallback": fallback} if question.method == "recommend" else given


def send_async(urls: Sequence[str], order: Order, results: Any) -> None:
    """Send with one asyncio client of all servers; put the sender's result on ``results``."""
    sender = Sender(order)

    async def main() -> None:
        async with AsyncRecommenderClient(urls) as client:

            async def ask(question: Question, fallback: str | None, timeout: float) -> Answer:
                try:
                    method = getattr(client, question.method)
                    return _answer_of(question, await method(**_arguments(question, fallback, timeout)))
                except ClientError as error:
                    return Answer(error=type(error).__name__, text=str(error))

            await sender.send(ask)

    asyncio.run(main())
    results.put(sender.result())


def send_sync(urls: Sequence[str], order: Order, results: Any) -> None:
    """Send with one synchronous client of all servers, which threads share; put the sender's result on ``results``."""
    sender = Sender(order)
    end = time.monotonic() + sender.seconds

    def work(client: RecommenderClient) -> None:
        while time.monotonic() < end:
            time.sleep(sender.pause(1 / THREADS))
            question, fallback, timeout = sender.draw()
            began = time.time()
            try:
                found = getattr(client, question.method)(**_arguments(question, fallback, timeout))
                answer = _answer_of(question, found)
            except ClientError as error:
                answer = Answer(error=type(error).__name__, text=str(error))
            sender.note(question, answer, timeout, began)

    with RecommenderClient(urls) as client:
        threads = [threading.Thread(target=work, args=(client,)) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    results.put(sender.result())


ERRORS = {"invalid_request": InvalidRequest, "overloaded": Overloaded, "timeout": RequestTimeout}
"""Errors of the gateway that are no failure, by their names."""


def as_http(question: Question, fallback: str | None, chance: random.Random) -> tuple[str, dict[str, Any]]:
    """Return path and body of a request to the gateway; rankings of titles or ids often in the shape of a reranker."""
    given = question.arguments
    if question.method == "similar":
        return "/v1/similar", dict(given)
    titles = set(given) == {"history_titles", "candidate_titles"}
    ids = set(given) == {"history", "candidates"} and bool(question.right["ranker"])
    if (titles or ids) and chance.random() < 0.7:
        names = ("history_titles", "candidate_titles") if titles else ("history", "candidates")
        query, documents = (list(given[name]) for name in names)
        body = {"query": "\n".join(query), "documents": documents, "model": "llamarec" if titles else "llamarec/ids"}
        return chance.choice(["/v1/rerank", "/v2/rerank"]), body
    return "/v1/recommend", {**given, **({"fallback": fallback} if fallback else {})}


def read_http(path: str, body: Mapping[str, Any], question: Question, status: int, found: Any) -> Answer:
    """Return the gateway's answer; that of a reranker is completed by the retriever's ranks, which it does not have."""
    if status != 200:
        error = ERRORS.get("invalid_request" if status in (400, 422) else found["error"])
        return Answer(error=error.__name__ if error else f"{status} {found['error']}", text=found["detail"])
    if path == "/v1/similar":
        return Answer(
            [tuple(row[name] for name in ("item_id", "score", "transitions", "titles")) for row in found["items"]]
        )
    if path == "/v1/recommend":
        rows = [(row["item_id"], row["score"], row["retriever_rank"]) for row in found["items"]]
        return Answer(rows, found["degraded"])
    ids = (
        body["documents"] if body["model"].endswith("/ids") else [str(place) for place in range(len(body["documents"]))]
    )
    scored = [(ids[row["index"]], row["relevance_score"]) for row in found["results"]]
    for rows in question.right["ranker"]:
        if [row[:2] for row in rows] == scored:
            return Answer(rows)
    return Answer([(item, score, 0) for item, score in scored])


@dataclass
class HttpCaller:
    """Asks a gateway over HTTP."""

    session: aiohttp.ClientSession
    chance: random.Random

    async def __call__(self, question: Question, fallback: str | None, timeout: float) -> Answer:
        path, body = as_http(question, fallback, self.chance)
        headers = {"X-Request-Timeout": f"{timeout:g}"}
        try:
            async with self.session.post(path, json=body, headers=headers) as answered:
                return read_http(path, body, question, answered.status, await answered.json())
        except (aiohttp.ClientError, json.JSONDecodeError) as error:
            return Answer(error=type(error).__name__, text=f"{path}: {error}")


def http_session(url: str) -> aiohttp.ClientSession:
    """Return a session with as many connections as there are requests in flight.

    It closes idle ones before the gateway does, after 5 s, so that no request meets a connection that is being closed.
    """
    return aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2))


def send_http(url: str, order: Order, results: Any) -> None:
    """Send to the gateway; put the sender's result on ``results``. A cancelled request closes its connection."""
    sender = Sender(order)

    async def main() -> None:
        async with http_session(url) as session:
            await sender.send(HttpCaller(session, random.Random(order.seed)))

    asyncio.run(main())
    results.put(sender.result())


async def send_each(url: str, questions: Sequence[Question]) -> tuple[Counter[str], list[tuple[float, float, str]]]:
    """Send every request to the gateway once, sixteen at a time, and return the counts and the failures."""
    sender, room = Sender(Order(questions, 1.0, 0.0, 0)), asyncio.Semaphore(16)
    async with http_session(url) as session:
        ask = HttpCaller(session, random.Random(0))

        async def one(question: Question) -> None:
            async with room:
                began = time.time()
                sender.note(question, await ask(question, None, DEADLINE), DEADLINE, began)

        await asyncio.gather(*map(one, questions))
    return sender.result()


def record(urls: Sequence[str], gateway: str, rate: float, seconds: float, seed: int, results: Any) -> None:
    """Record one event after another of a few users, about ``rate`` a second, in turn over gRPC and the gateway.

    Put ``(acknowledged, failures)`` on ``results``: user, item and time of each event that the server acknowledged, and
    when each failure began and ended, with its text.
    """
    chance = random.Random(seed)
    acknowledged: list[tuple[str, str, int]] = []
    failures: list[tuple[float, float, str]] = []

    async def over_http(session: aiohttp.ClientSession, user: str, item: str, moment: int) -> None:
        body = {"user_id": user, "item_ids": [item], "timestamps": [moment]}
        async with session.post("/v1/events", json=body) as answered:
            if answered.status != 200:
                raise ClientError(await answered.text())

    async def main() -> None:
        async with AsyncRecommenderClient(urls) as client, aiohttp.ClientSession(gateway) as session:
            start = time.monotonic()
            while time.monotonic() < start + seconds:
                began = time.time()
                user, item, moment = f"soak-{chance.randrange(20)}", f"item-{len(acknowledged)}", round(1000 * began)
                try:
                    if len(acknowledged) % 2:
                        await over_http(session, user, item, moment)
                    else:
                        await client.record(user, [item], timestamps=[moment], timeout=DEADLINE)
                    acknowledged.append((user, item, moment))
                except (ClientError, aiohttp.ClientError) as error:
                    failures.append((began, time.time(), f"event {type(error).__name__}: {error!s:.300}"))
                await asyncio.sleep(chance.expovariate(rate))

    asyncio.run(main())
    results.put((acknowledged, failures))


class CuttingProxy:
    """Passes connections on to a server, and cuts all of them on demand."""

    def __init__(self, url: str) -> None:
        host, port = url.split(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self.url = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
            except OSError:
                return
            self._open |= {near, far}
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            self._open.discard(end)
            end.close()

    def cut(self) -> None:
        """Break every connection in the middle of its data."""
        for end in list(self._open):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        self.cut()


def slow_reader(url: str, history: Sequence[str]) -> socket.socket:
    """Return a client that sends a request but lets the server return nothing: its HTTP/2 window has 0 bytes."""
    content = b"".join(struct.pack("<I", len(raw)) + raw for raw in (item.encode() for item in history))
    request = service_pb2.ModelInferRequest(model_name="llamarec", raw_input_contents=[content])
    request.inputs.add(name="HISTORY", datatype="BYTES", shape=[1, len(history)])
    body = request.SerializeToString()
    connection = H2Connection(H2Configuration(client_side=True))
    connection.local_settings = Settings(client=True, initial_values={SettingCodes.INITIAL_WINDOW_SIZE: 0})
    connection.initiate_connection()
    head = {":method": "POST", ":scheme": "http", ":authority": url}
    head |= {
        ":path": "/inference.GRPCInferenceService/ModelInfer",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    connection.send_headers(1, list(head.items()))
    connection.send_data(1, b"\0" + struct.pack(">I", len(body)) + body, end_stream=True)
    host, port = url.split(":")
    reader = socket.create_connection((host, int(port)))
    reader.sendall(connection.data_to_send())
    return reader
