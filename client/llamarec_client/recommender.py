"""gRPC clients of the recommender, synchronous and asyncio, with the same methods and errors."""

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
"""Seconds. A ranking pass takes about one on a CPU, and the request may have to queue for it."""
IN_FLIGHT = 32
"""Maximum number of requests in flight in a call for many users: enough to fill the batches of the server's steps."""
KEEP_ALIVE = 20.0
"""Seconds without traffic during a call after which the connection is probed."""
CHANNEL_OPTIONS = {
    "grpc.max_send_message_length": -1,
    "grpc.max_receive_message_length": -1,
    # With the defaults, a client reconnects to a restarted server only after a second or more.
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.min_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 500,
}

Fallback = Literal["retriever"]
Result = Recommendations | ClientError
"""Answer or error for one user of a call for many."""


@dataclass(frozen=True)
class Tls:
    """Certificates for an encrypted connection, each a PEM file."""

    root_certificates: Path | None = None
    """Certificate of the authority that signed the server's. Default: gRPC's own list."""
    certificate_chain: Path | None = None
    """The client's certificate, for mutual TLS; needs ``private_key``."""
    private_key: Path | None = None


class _Connection:
    """Settings that both clients share: the address, the channel's options and the retry budget."""

    def __init__(self, url: str, tls: Tls | None, keep_alive: float) -> None:
        probe = round(keep_alive * 1000)
        options = {
            **CHANNEL_OPTIONS,
            "grpc.keepalive_time_ms": probe,
            "grpc.keepalive_timeout_ms": min(probe, 10_000),
            "grpc.http2.ping_timeout_ms": min(probe, 10_000),  # a minute by default, regardless of the line above
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
                    raise InvalidRequest(f"{name} {path} is not a file: give a PEM file")
            if (tls.certificate_chain is None) != (tls.private_key is None):
                raise InvalidRequest("mutual TLS needs both certificate_chain and private_key: give the missing one")
            self.channel |= {"ssl": True, **{name: path and str(path) for name, path in files.items()}}

    def call(self, model: str, timeout: float, fallback: Fallback | None, request_id: str | None) -> Call:
        if not timeout > 0:
            raise InvalidRequest(f"timeout is {timeout:g} s: give a number above 0")
        if fallback not in (None, "retriever"):
            raise InvalidRequest(f"fallback is {fallback!r}: give 'retriever' or None")
        second = RETRIEVAL_ENSEMBLE if fallback and model != RETRIEVAL_ENSEMBLE else None
        return Call(self.url, model, request_id or uuid.uuid4().hex, timeout, second, self.budget)


def _answer(call: Call, result: grpc.InferResult) -> Recommendations:
    return Recommendations(
        read_result(result), model=call.model, degraded=bool(call.degraded), request_id=call.request_id
    )


class RecommenderClient:
    """A connection to a running server, for synchronous code; threads can share it.

    Every call has a deadline. Within it, a call makes at most three attempts if the server is unavailable, and two if a
    step is dead. Retries are limited to a tenth of the client's requests, so they do not amplify an overload.

    Args:
        url: ``host:port`` of the server's gRPC endpoint.
        tls: certificates for an encrypted connection. Default: no encryption.
        keep_alive: seconds without traffic during a call after which the connection is probed; it is closed if the
            probe gets no response.

    Raises:
        InvalidRequest: a certificate's file is missing.
    """

    def __init__(self, url: str = DEFAULT_URL, *, tls: Tls | None = None, keep_alive: float = KEEP_ALIVE) -> None:
        self._connection = _Connection(url, tls, keep_alive)
        self._client = grpc.InferenceServerClient(**self._connection.channel)

    def __enter__(self) -> "RecommenderClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
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
        """Return one user's recommendations, best first.

        Args:
            history: raw ids of the user's items, oldest first. Unknown ids are skipped; the history may be empty.
            exclude: raw ids that must not be returned.
            candidates: raw ids to rank instead of retrieving.
            top_k: number of items to return. Default: all.
            user_id: user id for the server's logs; the models do not use it.
            model: the ensemble to call; ``llamarec_retrieval`` answers without the language model.
            timeout: seconds until the call fails, including retries and fallback.
            fallback: ``"retriever"`` calls ``llamarec_retrieval`` when the model refuses the request, is dead or is too
                slow, and marks the answer ``degraded``; a tenth of the timeout, at most 0.25 s, is reserved for it.
            request_id: id of the request in the server's logs. Default: a new id.

        Raises:
            InvalidRequest: the request exceeds one of the contract's limits; the message names the tensor.
            RequestTimeout: there was no answer in time.
            ServerUnavailable: nothing listens at the address, or the model is not loaded there; ``Overloaded`` if the
                queue is full.
            ServerError: the server failed; ``StepDied`` if the process of a step died.
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
        """Return the recommendations of many users, requested concurrently on one connection.

        Args:
            requests: one request per user.
            model: see :meth:`recommend`.
            timeout: seconds until a user's call fails, from the moment that it is sent.
            fallback: see :meth:`recommend`.
            in_flight: maximum number of requests in flight; the server batches them.

        Returns:
            For each request, in order, the answer or the error of this user's call.
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
    """The asyncio version of :class:`RecommenderClient`. Cancelling a task also cancels its request on the server."""

    def __init__(self, url: str = DEFAULT_URL, *, tls: Tls | None = None, keep_alive: float = KEEP_ALIVE) -> None:
        """Connect as :class:`RecommenderClient` does; needs a running event loop."""
        self._connection = _Connection(url, tls, keep_alive)
        self._client = aio.InferenceServerClient(**self._connection.channel)

    async def __aenter__(self) -> "AsyncRecommenderClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection."""
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
        """Return one user's recommendations; see :meth:`RecommenderClient.recommend`."""
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
        """Return the recommendations of many users; see :meth:`RecommenderClient.recommend_many`."""
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
