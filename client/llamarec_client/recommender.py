"""gRPC clients of the recommender: one for plain code, one for asyncio, with the same calls and the same errors."""

import asyncio
import time
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from tritonclient import grpc
from tritonclient.grpc import aio
from tritonclient.utils import InferenceServerException

from llamarec_client.contract import ENSEMBLE, RETRIEVAL_ENSEMBLE
from llamarec_client.errors import ClientError, InvalidRequest
from llamarec_client.messages import Recommendation, Recommendations, Request, read_result, requested_outputs
from llamarec_client.retries import Call, RetryBudget

__all__ = ["AsyncRecommenderClient", "Recommendation", "Recommendations", "RecommenderClient", "Request", "Tls"]

DEFAULT_URL = "127.0.0.1:8001"
DEFAULT_TIMEOUT = 30.0
"""Seconds: a ranking pass takes about one on a CPU, and a queue may stand before it."""
IN_FLIGHT = 32
"""Requests under way at a time in a call for many users: enough that the server's steps fill their batches."""
KEEP_ALIVE = 20.0
"""Seconds of silence in a call after which the connection is probed."""
CHANNEL_OPTIONS = {
    "grpc.max_send_message_length": -1,
    "grpc.max_receive_message_length": -1,
    # Without these a client finds a restarted server only after a second or more.
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.min_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 500,
}

Fallback = Literal["retriever"]
Result = Recommendations | ClientError
"""One user's part of a call for many."""


@dataclass(frozen=True)
class Tls:
    """Certificates of an encrypted connection, each a PEM file."""

    root_certificates: Path | None = None
    """Of the authority that signed the server's certificate; by default gRPC's own list."""
    certificate_chain: Path | None = None
    """The client's own, with ``private_key``: mutual TLS."""
    private_key: Path | None = None


class _Connection:
    """What both clients know before they send anything: the address, the channel's options, the retry budget."""

    def __init__(self, url: str, tls: Tls | None, keep_alive: float) -> None:
        probe = round(keep_alive * 1000)
        options = {
            **CHANNEL_OPTIONS,
            "grpc.keepalive_time_ms": probe,
            "grpc.keepalive_timeout_ms": min(probe, 10_000),
            "grpc.http2.ping_timeout_ms": min(probe, 10_000),  # a minute by default, whatever the line above says
        }
        self.url = url
        self.budget = RetryBudget()
        self.channel: dict[str, Any] = {"url": url, "channel_args": list(options.items())}
        if tls is not None:
            files = {
                "root_certificates": tls.root_certificates,
                "certificate_chain": tls.certificate_chain,
                "private_key": tls.private_key,
            }
            for name, path in files.items():
                if path is not None and not path.is_file():
                    raise InvalidRequest(f"{path} is no file: {name} names a PEM file")
            if (tls.certificate_chain is None) != (tls.private_key is None):
                raise InvalidRequest("mutual TLS needs both certificate_chain and private_key")
            self.channel |= {"ssl": True, **{name: path and str(path) for name, path in files.items()}}

    def call(self, model: str, timeout: float, fallback: Fallback | None, request_id: str | None) -> Call:
        if not timeout > 0:
            raise InvalidRequest(f"timeout is {timeout:g} s: give a number above 0")
        if fallback not in (None, "retriever"):
            raise InvalidRequest(f"fallback is {fallback!r}: the only one is 'retriever'")
        second = RETRIEVAL_ENSEMBLE if fallback and model != RETRIEVAL_ENSEMBLE else None
        return Call(self.url, model, request_id or uuid.uuid4().hex, timeout, second, self.budget)


def _answer(call: Call, result: grpc.InferResult) -> Recommendations:
    return Recommendations(
        read_result(result), model=call.model, degraded=bool(call.degraded), request_id=call.request_id
    )


class RecommenderClient:
    """A connection to a running server, for plain code; may be shared by threads.

    Every call has a deadline. An unavailable server is asked again within it, at most three times, and a dead step
    once; retries are at most a tenth of a client's requests, so they never amplify an overload.
    """

    def __init__(self, url: str = DEFAULT_URL, *, tls: Tls | None = None, keep_alive: float = KEEP_ALIVE) -> None:
        """Args:
        url: ``host:port`` of the server's gRPC endpoint.
        tls: certificates of an encrypted connection; without them it is plain.
        keep_alive: seconds of silence within a call after which the connection is probed, and given up if nothing
            comes back.

        Raises:
            InvalidRequest: a certificate's file is missing.
        """
        self._connection = _Connection(url, tls, keep_alive)
        self._client = grpc.InferenceServerClient(**self._connection.channel)

    def __enter__(self) -> "RecommenderClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection."""
        self._client.close()

    def recommend(
        self,
        history: Sequence[str],
        *,
        exclude: Sequence[str] | None = None,
        candidates: Sequence[str] | None = None,
        top_k: int | None = None,
        user_id: str | None = None,
        model: str = ENSEMBLE,
        timeout: float = DEFAULT_TIMEOUT,
        fallback: Fallback | None = None,
        request_id: str | None = None,
    ) -> Recommendations:
        """Asks for one user's recommendations, best first.

        Args:
            history: raw ids of what the user took, oldest first; unknown ids are skipped, and it may be empty.
            exclude: raw ids never to return.
            candidates: raw ids to rank instead of retrieving.
            top_k: how many to return; all by default.
            user_id: for the server's logs; the models never see it.
            model: the ensemble to ask; ``llamarec_retrieval`` answers without the language model.
            timeout: seconds until the call is given up, retries and fallback included.
            fallback: ``"retriever"`` asks ``llamarec_retrieval`` when the model is refused, dead or too slow, and
                marks the answer ``degraded``; a tenth of the timeout, at most 0.25 s, is kept for it.
            request_id: as it will stand in the server's logs; a new one by default.

        Raises:
            InvalidRequest: the request is beyond one of the contract's limits; the text names the tensor.
            RequestTimeout: no answer in time.
            ServerUnavailable: nothing listens at the address, or the model is not loaded there; ``Overloaded`` when
                the queue is full.
            ServerError: the server failed; ``StepDied`` when the process of a step is gone.
        """
        request = Request(history, exclude, candidates, top_k, user_id)
        return self._send(request, model, timeout, fallback, request_id)

    def recommend_many(
        self,
        requests: Iterable[Request],
        *,
        model: str = ENSEMBLE,
        timeout: float = DEFAULT_TIMEOUT,
        fallback: Fallback | None = None,
        in_flight: int = IN_FLIGHT,
    ) -> list[Result]:
        """Asks for many users at once: single requests on one connection, which the server batches.

        Args:
            requests: one for each user.
            model: as in :meth:`recommend`, as ``fallback``.
            timeout: seconds for each user's call, from the moment that it is sent.
            fallback: as in :meth:`recommend`.
            in_flight: most requests under way at a time.

        Returns:
            For each request in its place the answer, or the error that this user's call ended with.
        """

        def one(request: Request) -> Result:
            try:
                return self._send(request, model, timeout, fallback, None)
            except ClientError as error:
                return error

        with ThreadPoolExecutor(in_flight) as pool:
            return list(pool.map(one, requests))

    def _send(
        self, request: Request, model: str, timeout: float, fallback: Fallback | None, request_id: str | None
    ) -> Recommendations:
        inputs, outputs = request.inputs(), requested_outputs()
        call = self._connection.call(model, timeout, fallback, request_id)
        while True:
            try:
                return _answer(call, self._client.infer(inputs=inputs, outputs=outputs, **call.arguments()))
            except InferenceServerException as failure:
                time.sleep(call.pause_after(failure))


class AsyncRecommenderClient:
    """The same for asyncio. Cancelling a task gives its request up, on the server too."""

    def __init__(self, url: str = DEFAULT_URL, *, tls: Tls | None = None, keep_alive: float = KEEP_ALIVE) -> None:
        """As :class:`RecommenderClient`; to be called where an event loop runs."""
        self._connection = _Connection(url, tls, keep_alive)
        self._client = aio.InferenceServerClient(**self._connection.channel)

    async def __aenter__(self) -> "AsyncRecommenderClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection."""
        await self._client.close()

    async def recommend(
        self,
        history: Sequence[str],
        *,
        exclude: Sequence[str] | None = None,
        candidates: Sequence[str] | None = None,
        top_k: int | None = None,
        user_id: str | None = None,
        model: str = ENSEMBLE,
        timeout: float = DEFAULT_TIMEOUT,
        fallback: Fallback | None = None,
        request_id: str | None = None,
    ) -> Recommendations:
        """As :meth:`RecommenderClient.recommend`."""
        request = Request(history, exclude, candidates, top_k, user_id)
        return await self._send(request, model, timeout, fallback, request_id)

    async def recommend_many(
        self,
        requests: Iterable[Request],
        *,
        model: str = ENSEMBLE,
        timeout: float = DEFAULT_TIMEOUT,
        fallback: Fallback | None = None,
        in_flight: int = IN_FLIGHT,
    ) -> list[Result]:
        """As :meth:`RecommenderClient.recommend_many`."""
        room = asyncio.Semaphore(in_flight)

        async def one(request: Request) -> Result:
            async with room:
                try:
                    return await self._send(request, model, timeout, fallback, None)
                except ClientError as error:
                    return error

        return await asyncio.gather(*map(one, requests))

    async def _send(
        self, request: Request, model: str, timeout: float, fallback: Fallback | None, request_id: str | None
    ) -> Recommendations:
        inputs, outputs = request.inputs(), requested_outputs()
        call = self._connection.call(model, timeout, fallback, request_id)
        while True:
            try:
                return _answer(call, await self._client.infer(inputs=inputs, outputs=outputs, **call.arguments()))
            except InferenceServerException as failure:
                await asyncio.sleep(call.pause_after(failure))
