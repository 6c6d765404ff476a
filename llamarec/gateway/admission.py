"""Admits requests: request id, API key, limits, deadline and drain; ends a request whose caller has hung up."""

import asyncio
import logging
import math
import re
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamarec.gateway.errors import RETRY_AFTER, Refusal, answer, gateway_error
from llamarec.gateway.keys import ApiKeys
from llamarec.gateway.metrics import Metrics
from llamarec.gateway.options import GatewayOptions

ENDPOINTS = ("/v1/recommend", "/v1/events", "/v1/similar", "/v1/rerank", "/v2/rerank")
"""Paths that have metrics of their own; all others under ``/v1/`` and ``/v2/`` are counted together."""
HUNG_UP = 499
"""Status in the metrics of a request whose caller hung up, after nginx."""
REQUEST_ID = re.compile(rb"[!-~]{1,128}")
"""Visible ASCII, so that an id is one word of one line in every log."""
log = logging.getLogger("llamarec.gateway")


@dataclass(frozen=True)
class Turn:
    """What an endpoint knows of the request that it answers."""

    request_id: str
    """Id from ``X-Request-ID``, or a new one."""
    end: float
    """When the deadline passes, by :func:`time.monotonic`."""

    def seconds(self) -> float:
        """Return the seconds until the deadline, at least a millisecond."""
        return max(self.end - time.monotonic(), 1e-3)


class _HungUp(Exception):  # noqa: N818 - what happened
    """The caller closed the connection."""


@dataclass
class _Answer:
    """What has been sent of an answer."""

    send: Send
    request_id: str
    close: bool = False
    """Whether the connection is closed afterwards."""
    status: int = field(default=0, init=False)
    """HTTP status; 0 until the answer begins."""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.request_id.encode())]
            if self.close:
                message["headers"].append((b"connection", b"close"))
        await self.send(message)


class Admission:
    """ASGI middleware that admits a request and watches over it.

    Args:
        app: the application behind it.
        options: limits and deadline.
        keys: keys of the callers.
        metrics: where requests are counted.
    """

    def __init__(self, app: ASGIApp, *, options: GatewayOptions, keys: ApiKeys, metrics: Metrics) -> None:
        self._app, self._options, self._keys, self._metrics = app, options, keys, metrics
        self._in_flight = 0
        self.draining = False
        """Whether further requests are refused, because the gateway stops."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it. Paths outside of ``/v1/`` and ``/v2/`` are open and not limited."""
        if scope["type"] != "http" or not scope["path"].startswith(("/v1/", "/v2/")):
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        sent = _Answer(send, given.decode() if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex, self.draining)
        endpoint = scope["path"] if scope["path"] in ENDPOINTS else "other"
        began, hung_up = time.monotonic(), False
        try:
            turn = self._admit(headers, sent.request_id, began)
            self._take_place()
            try:
                await self._answer(scope, receive, sent, headers, turn)
            finally:
                self._count(-1)
        except Refusal as refused:
            await answer(refused, sent.request_id)(scope, receive, sent)
        except _HungUp:
            hung_up = True
        except Exception:
            log.exception("request %s to %s failed in the gateway", sent.request_id, endpoint)
            if not sent.status:
                await answer(gateway_error(), sent.request_id)(scope, receive, sent)
        finally:
            status = HUNG_UP if hung_up else sent.status or HUNG_UP
            self._metrics.requests.labels(endpoint, str(status)).inc()
            self._metrics.seconds.labels(endpoint).observe(time.monotonic() - began)

    def _admit(self, headers: Mapping[bytes, bytes], request_id: str, began: float) -> Turn:
        """Return the facts about an admitted request.

        Raises:
            Refusal: the key is missing or wrong, a header has a value that it cannot have, or the gateway is stopping.
        """
        if not self._keys.accepts(headers.get(b"authorization", b"")):
            raise Refusal(
                401,
                "unauthorized",
                "the API key is missing or wrong: send the header Authorization: Bearer KEY",
                {"WWW-Authenticate": "Bearer"},
            )
        if self.draining:
            raise Refusal(503, "stopping", "this gateway is stopping: send the request again", RETRY_AFTER)
        if b"x-request-id" in headers and request_id.encode() != headers[b"x-request-id"]:
            raise Refusal(400, "invalid_request", "X-Request-ID is not 1 to 128 visible ASCII characters: shorten it")
        return Turn(request_id, began + self._seconds(headers.get(b"x-request-timeout")))

    def _seconds(self, given: bytes | None) -> float:
        """Return the seconds that a request may take, from ``X-Request-Timeout``."""
        if given is None:
            return self._options.timeout
        try:
            seconds = float(given)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            raise Refusal(400, "invalid_request", "X-Request-Timeout is not a number of seconds above 0, such as 2.5")
        return min(seconds, self._options.timeout)

    def _take_place(self) -> None:
        """Count a request among those in flight.

        Raises:
            Refusal: there are as many as there may be.
        """
        if self._in_flight >= self._options.in_flight:
            raise Refusal(
                429,
                "too_many_requests",
                f"{self._options.in_flight} requests are in flight at this gateway: send fewer, or retry later",
                RETRY_AFTER,
            )
        self._count(1)

    def _count(self, change: int) -> None:
        self._in_flight += change
        self._metrics.in_flight.set(self._in_flight)

    async def _answer(
        self, scope: Scope, receive: Receive, sent: _Answer, headers: Mapping[bytes, bytes], turn: Turn
    ) -> None:
        """Read the body, and let the application answer while the caller is there.

        Raises:
            Refusal: the body is too large or too slow, or the time of a draining gateway is over.
            _HungUp: the caller closed the connection; what the application did is cancelled.
        """
        try:
            body = await asyncio.wait_for(self._body(receive, headers), turn.seconds())
        except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
            sent.close = True
            raise Refusal(408, "body_timeout", "the body did not arrive before the deadline: send it faster") from None
        scope.setdefault("state", {})["turn"] = turn
        work = asyncio.ensure_future(self._app(scope, _replay(body), sent))
        gone = asyncio.ensure_future(_hung_up(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise _HungUp
            await work
        except asyncio.CancelledError:
            await _end(work)
            if not self.draining or sent.status:
                raise
            raise Refusal(503, "stopping", "this gateway stopped before the answer: send the request again") from None
        finally:
            await _end(work)
            gone.cancel()

    async def _body(self, receive: Receive, headers: Mapping[bytes, bytes]) -> bytes:
        most = self._options.body_bytes
        too_large = Refusal(413, "body_too_large", f"the body has more than {most:,} bytes: send a smaller one")
        with suppress(ValueError):  # without a length, or with a wrong one, the bytes that arrive are counted
            if int(headers.get(b"content-length", b"")) > most:
                raise too_large
        chunks, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _HungUp
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > most:
                raise too_large
            more = message.get("more_body", False)
        return b"".join(chunks)


def _replay(body: bytes) -> Receive:
    """Return an ASGI ``receive`` that gives a body which was read before."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        never: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        return await never  # until the request is cancelled

    return receive


async def _hung_up(receive: Receive) -> None:
    """Wait until the caller has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(work: "asyncio.Future[Any]") -> None:
    """Cancel a task, and wait until it has ended, so that its request to the server is cancelled too."""
    if not work.done():
        work.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await work
