"""The requests of the soak test, sent from separate processes, and the ways in which it disturbs connections."""

import asyncio
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.settings import SettingCodes, Settings
from tritonclient.grpc import service_pb2

from llamarec_client.errors import ClientError, InvalidRequest, Overloaded
from llamarec_client.recommender import AsyncRecommenderClient, Recommendations

DEADLINE = 20.0
Rows = list[tuple[str, float, int]]


def rows(answer: Recommendations) -> Rows:
    return [(row.item_id, row.score, row.retriever_rank) for row in answer]


def kind(expected: Mapping[str, list[Rows]], outcome: Recommendations | ClientError) -> str:
    """Return the outcome of a request: answered, degraded, refused, failed, or wrong.

    Args:
        expected: the correct offline answers, by ``ranker`` and ``retriever``; if empty, InvalidRequest is correct.
        outcome: the answer or the error.
    """
    if isinstance(outcome, InvalidRequest):
        return "refused as bad input" if not expected["ranker"] else "wrong"
    if isinstance(outcome, Overloaded):
        return "refused"
    if isinstance(outcome, ClientError):
        return "failed"
    if rows(outcome) not in expected["retriever" if outcome.degraded else "ranker"]:
        return "wrong"
    return "degraded" if outcome.degraded else "answered"


def send(
    url: str,
    questions: Sequence[tuple[Mapping[str, Any], Mapping[str, list[Rows]]]],
    rate: float,
    seconds: float,
    seed: int,
    results: Any,
) -> None:
    """Send requests at random moments, ``rate`` a second (open loop), every second one with a fallback.

    Put ``(counts, failures)`` on ``results``; a failure is when it began, when it ended, and its text.
    """
    chance = random.Random(seed)
    counts: Counter[str] = Counter()
    failures: list[tuple[float, float, str]] = []

    async def ask(client: AsyncRecommenderClient, place: int, fallback: Any) -> None:
        question, expected = questions[place]
        outcome: Recommendations | ClientError
        began = time.time()
        try:
            outcome = await client.recommend(**question, fallback=fallback, timeout=DEADLINE)
        except ClientError as error:
            outcome = error
        became = kind(expected, outcome)
        counts[became] += 1
        if became in ("failed", "wrong"):
            failures.append((began, time.time(), f"{became} {type(outcome).__name__}: {outcome!s:.300}"))

    async def main() -> None:
        under_way: set[asyncio.Task[None]] = set()
        async with AsyncRecommenderClient(url) as client:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                counts["sent"] += 1
                fallback = "retriever" if counts["sent"] % 2 else None
                task = asyncio.create_task(ask(client, chance.randrange(len(questions)), fallback))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
                await asyncio.sleep(chance.expovariate(rate))
            await asyncio.gather(*under_way)

    asyncio.run(main())
    results.put((counts, failures))


def record(url: str, rate: float, seconds: float, seed: int, results: Any) -> None:
    """Record one event after another of a few users, about ``rate`` a second.

    Put ``(acknowledged, failures)`` on ``results``: user, item and time of each event that the server acknowledged, and
    when each failure began and ended, with its text.
    """
    chance = random.Random(seed)
    acknowledged: list[tuple[str, str, int]] = []
    failures: list[tuple[float, float, str]] = []

    async def main() -> None:
        async with AsyncRecommenderClient(url) as client:
            start = time.monotonic()
            while time.monotonic() < start + seconds:
                began = time.time()
                event = (f"soak-{chance.randrange(20)}", f"item-{len(acknowledged)}", round(1000 * began))
                try:
                    await client.record(event[0], [event[1]], timestamps=[event[2]], timeout=DEADLINE)
                    acknowledged.append(event)
                except ClientError as error:
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
