"""gRPC clients of the recommender, synchronous and asyncio, with the same methods and errors."""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from reprlib import repr as short
from types import TracebackType

from tritonclient import grpc
from tritonclient.grpc import aio
from tritonclient.utils import InferenceServerException

from llamarec_client.checks import whole_number
from llamarec_client.connection import KEEP_ALIVE, Channels, Connection, Fallback, Tls
from llamarec_client.contract import (
    CHANGED,
    ENSEMBLE,
    EVENTS,
    EVENTS_RESPONSE,
    HIDE,
    ITEMS,
    ITEMS_RESPONSE,
    NEW,
    SHOW,
    SIMILAR,
    SIMILAR_ITEMS,
    SIMILAR_RESPONSE,
)
from llamarec_client.errors import ClientError, InvalidRequest
from llamarec_client.messages import (
    Recommendation,
    Recommendations,
    Request,
    added_inputs,
    are_texts,
    event_inputs,
    listed_inputs,
    read_count,
    read_result,
    requested_outputs,
)
from llamarec_client.policy import Policy
from llamarec_client.retries import Call
from llamarec_client.similar import SimilarItem, read_similar, similar_inputs

__all__ = ["AsyncRecommenderClient", "Recommendation", "Recommendations", "RecommenderClient", "Request", "Tls"]

DEFAULT_URL = "127.0.0.1:8001"
DEFAULT_TIMEOUT = 30.0
"""Seconds. A ranking pass takes about one on a CPU, and the request may have to queue for it."""
IN_FLIGHT = 32
"""Default number of requests in flight in a call for many users: enough to fill the batches of the server's steps."""
MAX_IN_FLIGHT = 1024
"""Maximum of it: each request of the synchronous client has a thread."""
Result = Recommendations | ClientError
"""Answer or error for one user of a call for many."""


def _tensors(request: Request) -> list[grpc.InferInput]:
    """Return the tensors of a request.

    Raises:
        InvalidRequest: it is no request, or a value does not fit its tensor.
    """
    if not isinstance(request, Request):
        raise InvalidRequest(f"{short(request)} is not a request: give Request objects")
    return request.inputs()


def _each(requests: Iterable[Request]) -> list[Request]:
    """Return the requests of a call for many users.

    Raises:
        InvalidRequest: there is no list.
    """
    try:
        return list(requests)
    except TypeError:
        raise InvalidRequest(f"requests is {short(requests)}: give a list of Request objects") from None


def _answer(call: Call, result: grpc.InferResult) -> Recommendations:
    return Recommendations(
        read_result(result), model=call.model, degraded=bool(call.degraded), request_id=call.request_id
    )


class RecommenderClient:
    """Connections to one or more running servers, for synchronous code; threads can share it.

    Every call has a deadline. Within it, a call makes at most three attempts if the server is unavailable, and two if a
    step is dead. Retries are limited to a tenth of the client's requests, so they do not amplify an overload.

    With several servers, each request goes to the one with the fewest of this client's requests in flight. A server
    that fails is left out and tried again later, and a retry goes to another server.

    Args:
        url: ``host:port`` of the server's gRPC endpoint, or ``[ipv6]:port``; a list of them for several servers; or
            ``dns:///name:port`` for all servers that the name resolves to, now and later.
        tls: certificates for an encrypted connection. Default: no encryption.
        keep_alive: seconds without traffic during a call after which the connection is probed; it is closed if the
            probe gets no response; 0.1 or more.

    Raises:
        InvalidRequest: an argument is not what it has to be, for example because a certificate's file is missing.
    """

    def __init__(
        self, url: str | Sequence[str] = DEFAULT_URL, *, tls: Tls | None = None, keep_alive: float = KEEP_ALIVE
    ) -> None:
        self._connection = Connection(url, tls, keep_alive)
        self._channels = Channels(grpc.InferenceServerClient, self._connection)

    @property
    def mixed_releases(self) -> int:
        """Number of times that this client found its servers to serve different releases; it compares them each minute.

        Each time, the logger ``llamarec_client`` warns and names the release of every server.
        """
        return self._connection.releases.differences

    def __enter__(self) -> "RecommenderClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        for channel in self._channels.close():
            channel.close()

    def recommend(
        self,
        history: Sequence[str] | None = None,
        *,
        exclude: Sequence[str] | None = None,
        candidates: Sequence[str] | None = None,
        top_k: int | None = None,
        user_id: str | None = None,
        history_titles: Sequence[str] | None = None,
        candidate_titles: Sequence[str] | None = None,
        policy: Policy | None = None,
        model: str = ENSEMBLE,
        timeout: float = DEFAULT_TIMEOUT,
        fallback: Fallback | None = None,
        request_id: str | None = None,
    ) -> Recommendations:
        """Return one user's recommendations, best first.

        Args:
            history: raw ids of the user's items, oldest first. Unknown ids are skipped; the history may be empty.
                Default: the history that the server's store has of ``user_id``; a user who is not there has an empty
                one.
            exclude: raw ids that must not be returned.
            candidates: raw ids to rank instead of retrieving.
            top_k: number of items to return. Default: all.
            user_id: user id, for the server's logs and to look up the history if none is given; the models do not use
                it.
            history_titles: a title for each id in ``history``, which the language model reads instead of that in the
                catalogue; "" keeps the catalogue's. The language model also reads the titles of unknown ids. Without
                ids (``history`` is empty or left out), these texts are the history.
            candidate_titles: a title for each of ``candidates``, likewise; an unknown id with a title is ranked.
                Without ids (``candidates`` is empty or left out), these texts are ranked, and the ``item_id`` of each
                is its place, from "0". If the retriever does not know all candidates of a call with titles, the
                language model alone scores them.
            policy: rules about groups, boosts and repeats, which take the place of those of the server's release.
            model: the ensemble to call; ``llamarec_retrieval`` answers without the language model.
            timeout: seconds until the call fails, including retries and fallback; above 0.
            fallback: ``"retriever"`` calls ``llamarec_retrieval`` when the model refuses the request, is dead or is too
                slow, and marks the answer ``degraded``; a tenth of the timeout, at most 0.25 s, is reserved for it.
                Candidates that are texts without ids have no fallback.
            request_id: id of the request in the server's logs. Default: a new id.

        Raises:
            InvalidRequest: an argument is not what it has to be, or exceeds one of the contract's limits; the message
                names it. Or the client is closed.
            RequestTimeout: there was no answer in time.
            ServerUnavailable: nothing listens at the address, the model is not loaded there, or the store of histories
                is needed and cannot be reached; ``Overloaded`` if the queue is full.
            ServerError: the server failed; ``StepDied`` if the process of a step died.
        """
        request = Request(history, exclude, candidates, top_k, user_id, history_titles, candidate_titles, policy)
        return self._send(request, model, timeout, fallback, request_id)

    def similar(
        self,
        item_id: str,
        top_k: int = SIMILAR_ITEMS,
        *,
        model: str = SIMILAR,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> list[SimilarItem]:
        """Return the items that are nearest to an item by transitions and titles, best first, with what each says.

        Args:
            item_id: raw id of the item.
            top_k: maximum number of items, 1 to 1,000. Fewer are returned if no more are like it in any way; hidden
                ones never are.
            model: ``similar``, or ``similar_canary`` for the release under trial.
            timeout: seconds until the call fails, including retries. Default: 30.
            request_id: see :meth:`recommend`.

        Raises:
            InvalidRequest: an argument is not what it has to be, the item is not in the catalogue, or the release knows
                neither transitions nor titles.
            RequestTimeout: there was no answer in time.
            ServerUnavailable: no server answers, or its release is of a version without ``similar``.
            ServerError: the server failed.
        """
        inputs = similar_inputs(item_id, top_k)
        call = self._connection.call(model, DEFAULT_TIMEOUT if timeout is None else timeout, None, request_id)
        return read_similar(self._infer(call, inputs, requested_outputs(SIMILAR_RESPONSE)))

    def record(
        self,
        user_id: str,
        item_ids: Sequence[str],
        *,
        timestamps: Sequence[int] | None = None,
        kinds: Sequence[str] | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        request_id: str | None = None,
    ) -> int:
        """Record what a user did, and return how many of the events were new to the server's store.

        When it returns, the events are kept and are part of the user's history on every server with that store. The
        same user, item, kind and time is the same event, so a call may be repeated with the same ``timestamps``.

        Args:
            user_id: the user, 1 to 512 bytes of UTF-8.
            item_ids: raw ids of the items, at most 10,000; those that no model knows yet are kept as well.
            timestamps: for each item, when it happened, in milliseconds since 1970, UTC. Default: the milliseconds
                before this call, in the order of the items.
            kinds: for each item, what happened, such as ``"purchase"``. Default: ``"view"``.
            timeout: see :meth:`recommend`.
            request_id: see :meth:`recommend`.

        Raises:
            InvalidRequest: an argument is not what it has to be; the message names it.
            RequestTimeout: there was no answer in time; the events may be kept or not.
            ServerUnavailable: no server answers, or it has no store or cannot reach it.
            ServerError: the server failed.
        """
        inputs = event_inputs(user_id, item_ids, timestamps, kinds)
        call = self._connection.call(EVENTS, timeout, None, request_id)
        return read_count(self._infer(call, inputs, requested_outputs(EVENTS_RESPONSE)), NEW, EVENTS)

    def add_items(
        self, titles: Mapping[str, str], *, key: str, timeout: float = DEFAULT_TIMEOUT, request_id: str | None = None
    ) -> int:
        """Add items to the server's store, or give added ones another title, and return how many changed.

        Every server with that store knows them soon after. An item that is added again with the same title does not
        change, so a call may be repeated. When an answer is lost and the client asks again, what the first attempt
        changed is not counted.

        Args:
            titles: for each raw item id, 1 to 512 bytes of UTF-8, its title, 1 to 4,096 bytes; at most 10,000 items.
            key: the server's admin key. `llamarec serve` takes it from ``LLAMAREC_ADMIN_KEY``, or makes one and writes
                it to ``.serve.json`` in the model repository.
            timeout: see :meth:`recommend`.
            request_id: see :meth:`recommend`.

        Raises:
            InvalidRequest: an argument is not what it has to be, the key is wrong, or the server has none.
            RequestTimeout: there was no answer in time; the items may be changed or not.
            ServerUnavailable: no server answers, or it has no store or cannot reach it.
            ServerError: the server failed.
        """
        return self._change(added_inputs(titles, key), timeout, request_id)

    def hide_items(
        self, item_ids: Iterable[str], *, key: str, timeout: float = DEFAULT_TIMEOUT, request_id: str | None = None
    ) -> int:
        """Leave items out of the answers of every server with the same store, and return how many changed.

        Args:
            item_ids: raw ids of the items, at most 10,000.
            key: see :meth:`add_items`.
            timeout: see :meth:`recommend`.
            request_id: see :meth:`recommend`.

        Raises:
            ClientError: see :meth:`add_items`.
        """
        return self._change(listed_inputs(HIDE, item_ids, key), timeout, request_id)

    def show_items(
        self, item_ids: Iterable[str], *, key: str, timeout: float = DEFAULT_TIMEOUT, request_id: str | None = None
    ) -> int:
        """Show hidden items again, and return how many changed; see :meth:`hide_items`."""
        return self._change(listed_inputs(SHOW, item_ids, key), timeout, request_id)

    def recommend_many(
        self,
        requests: Iterable[Request],
        *,
        model: str = ENSEMBLE,
        timeout: float = DEFAULT_TIMEOUT,
        fallback: Fallback | None = None,
        in_flight: int = IN_FLIGHT,
    ) -> list[Result]:
        """Return the recommendations of many users, requested concurrently.

        Args:
            requests: one request per user.
            model: see :meth:`recommend`.
            timeout: seconds until a user's call fails, from the moment that it is sent.
            fallback: see :meth:`recommend`.
            in_flight: maximum number of requests in flight, 1 to 1,024; the server batches them.

        Returns:
            For each request, in order, the answer or the error of this user's call.

        Raises:
            InvalidRequest: ``requests`` is no list, or ``in_flight`` no such number.
        """

        def one(request: Request) -> Result:
            try:
                return self._send(request, model, timeout, fallback, None)
            except ClientError as error:
                return error

        with ThreadPoolExecutor(whole_number("in_flight", in_flight, MAX_IN_FLIGHT)) as pool:
            return list(pool.map(one, _each(requests)))

    def _change(self, inputs: list[grpc.InferInput], timeout: float, request_id: str | None) -> int:
        call = self._connection.call(ITEMS, timeout, None, request_id)
        return read_count(self._infer(call, inputs, requested_outputs(ITEMS_RESPONSE)), CHANGED, ITEMS)

    def _send(
        self, request: Request, model: str, timeout: float, fallback: Fallback | None, request_id: str | None
    ) -> Recommendations:
        call = self._connection.call(model, timeout, fallback, request_id)
        inputs = _tensors(request)
        if are_texts(inputs):
            call.fallback = None
        return _answer(call, self._infer(call, inputs, requested_outputs()))

    def _infer(
        self, call: Call, inputs: list[grpc.InferInput], outputs: list[grpc.InferRequestedOutput]
    ) -> grpc.InferResult:
        while True:
            if wait := self._connection.refresh(call):
                wait()
            for channel in self._channels.unused():
                channel.close()
            try:
                with self._connection.attempt(call) as server:
                    return self._channels.to(server).infer(inputs=inputs, outputs=outputs, **call.arguments())
            except InferenceServerException as failure:
                time.sleep(call.pause_after(failure))
            except ClientError:
                raise
            except Exception as error:
                raise self._connection.failure(error) from error


class AsyncRecommenderClient:
    """The asyncio version of :class:`RecommenderClient`. Cancelling a task also cancels its request on the server."""

    def __init__(
        self, url: str | Sequence[str] = DEFAULT_URL, *, tls: Tls | None = None, keep_alive: float = KEEP_ALIVE
    ) -> None:
        """Connect as :class:`RecommenderClient` does; needs a running event loop."""
        self._connection = Connection(url, tls, keep_alive)
        self._channels = Channels(aio.InferenceServerClient, self._connection)

    @property
    def mixed_releases(self) -> int:
        """Number of times that this client found its servers to serve different releases; it compares them each minute.

        Each time, the logger ``llamarec_client`` warns and names the release of every server.
        """
        return self._connection.releases.differences

    async def __aenter__(self) -> "AsyncRecommenderClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        for channel in self._channels.close():
            await channel.close()

    async def recommend(
        self,
        history: Sequence[str] | None = None,
        *,
        exclude: Sequence[str] | None = None,
        candidates: Sequence[str] | None = None,
        top_k: int | None = None,
        user_id: str | None = None,
        history_titles: Sequence[str] | None = None,
        candidate_titles: Sequence[str] | None = None,
        policy: Policy | None = None,
        model: str = ENSEMBLE,
        timeout: float = DEFAULT_TIMEOUT,
        fallback: Fallback | None = None,
        request_id: str | None = None,
    ) -> Recommendations:
        """Return one user's recommendations; see :meth:`RecommenderClient.recommend`."""
        request = Request(history, exclude, candidates, top_k, user_id, history_titles, candidate_titles, policy)
        return await self._send(request, model, timeout, fallback, request_id)

    async def similar(
        self,
        item_id: str,
        top_k: int = SIMILAR_ITEMS,
        *,
        model: str = SIMILAR,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> list[SimilarItem]:
        """Return the items that are nearest to an item; see :meth:`RecommenderClient.similar`."""
        inputs = similar_inputs(item_id, top_k)
        call = self._connection.call(model, DEFAULT_TIMEOUT if timeout is None else timeout, None, request_id)
        return read_similar(await self._infer(call, inputs, requested_outputs(SIMILAR_RESPONSE)))

    async def record(
        self,
        user_id: str,
        item_ids: Sequence[str],
        *,
        timestamps: Sequence[int] | None = None,
        kinds: Sequence[str] | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        request_id: str | None = None,
    ) -> int:
        """Record what a user did; see :meth:`RecommenderClient.record`."""
        inputs = event_inputs(user_id, item_ids, timestamps, kinds)
        call = self._connection.call(EVENTS, timeout, None, request_id)
        return read_count(await self._infer(call, inputs, requested_outputs(EVENTS_RESPONSE)), NEW, EVENTS)

    async def add_items(
        self, titles: Mapping[str, str], *, key: str, timeout: float = DEFAULT_TIMEOUT, request_id: str | None = None
    ) -> int:
        """Add items to the server's store; see :meth:`RecommenderClient.add_items`."""
        return await self._change(added_inputs(titles, key), timeout, request_id)

    async def hide_items(
        self, item_ids: Iterable[str], *, key: str, timeout: float = DEFAULT_TIMEOUT, request_id: str | None = None
    ) -> int:
        """Leave items out of all answers; see :meth:`RecommenderClient.hide_items`."""
        return await self._change(listed_inputs(HIDE, item_ids, key), timeout, request_id)

    async def show_items(
        self, item_ids: Iterable[str], *, key: str, timeout: float = DEFAULT_TIMEOUT, request_id: str | None = None
    ) -> int:
        """Show hidden items again; see :meth:`RecommenderClient.show_items`."""
        return await self._change(listed_inputs(SHOW, item_ids, key), timeout, request_id)

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
        room = asyncio.Semaphore(whole_number("in_flight", in_flight, MAX_IN_FLIGHT))

        async def one(request: Request) -> Result:
            async with room:
                try:
                    return await self._send(request, model, timeout, fallback, None)
                except ClientError as error:
                    return error

        return await asyncio.gather(*map(one, _each(requests)))

    async def _change(self, inputs: list[grpc.InferInput], timeout: float, request_id: str | None) -> int:
        call = self._connection.call(ITEMS, timeout, None, request_id)
        return read_count(await self._infer(call, inputs, requested_outputs(ITEMS_RESPONSE)), CHANGED, ITEMS)

    async def _send(
        self, request: Request, model: str, timeout: float, fallback: Fallback | None, request_id: str | None
    ) -> Recommendations:
        call = self._connection.call(model, timeout, fallback, request_id)
        inputs = _tensors(request)
        if are_texts(inputs):
            call.fallback = None
        return _answer(call, await self._infer(call, inputs, requested_outputs()))

    async def _infer(
        self, call: Call, inputs: list[grpc.InferInput], outputs: list[grpc.InferRequestedOutput]
    ) -> grpc.InferResult:
        while True:
            if wait := self._connection.refresh(call):
                await asyncio.to_thread(wait)
            for channel in self._channels.unused():
                await channel.close()
            try:
                with self._connection.attempt(call) as server:
                    return await self._channels.to(server).infer(inputs=inputs, outputs=outputs, **call.arguments())
            except InferenceServerException as failure:
                await asyncio.sleep(call.pause_after(failure))
            except ClientError:
                raise
            except asyncio.CancelledError as error:
                if not self._connection.closed or _is_cancelled():
                    raise
                raise self._connection.failure(error) from None  # gRPC cancels the calls of a client that is closed
            except Exception as error:
                raise self._connection.failure(error) from error


def _is_cancelled() -> bool:
    """Return whether somebody cancelled the running task. Before Python 3.11 a task cannot tell; then, False."""
    cancelling: Callable[[], int] = getattr(asyncio.current_task(), "cancelling", lambda: 0)
    return cancelling() > 0
