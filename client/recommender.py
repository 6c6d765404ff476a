"""gRPC clients of the recommender: one for plain code, one for asyncio, with the same calls and the same errors."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient import grpc
from tritonclient.grpc import aio
from tritonclient.utils import InferenceServerException

from client.contract import (
    CANDIDATES,
    ENSEMBLE,
    EXCLUDE,
    HISTORY,
    ITEM_ID,
    RESPONSE,
    RETRIEVER_RANK,
    SCORE,
    TOP_K,
    USER_ID,
    TensorSpec,
)
from client.errors import ClientError, InvalidRequest, RequestTimeout, ServerError, ServerUnavailable

DEFAULT_URL = "127.0.0.1:8001"
DEFAULT_TIMEOUT = 30.0
"""Seconds: a ranking pass takes about one on a CPU, and a queue may stand before it."""


@dataclass(frozen=True)
class Recommendation:
    """One recommended item."""

    item_id: str
    """The raw id, as in the interaction log."""
    score: float
    """Probability over the candidates; they sum to 1 before ``top_k`` cuts."""
    retriever_rank: int
    """The place the retriever gave it among the candidates, from 1; 0 if the retriever does not know it."""


def _text_input(spec: TensorSpec, values: Iterable[str]) -> grpc.InferInput:
    """A STRING input of one request.

    Raises:
        InvalidRequest: a value is no text, or no text that UTF-8 can hold.
    """
    if isinstance(values, (str, bytes)):
        raise InvalidRequest(f"{spec.name} is one string: give a list of item ids")
    encoded = []
    for value in values:
        try:
            encoded.append(value.encode())
        except (AttributeError, UnicodeEncodeError):
            raise InvalidRequest(f"{spec.name} holds {value!r}: item ids are strings of valid Unicode") from None
    array = np.empty((1, len(encoded)), dtype=object)
    array[0] = encoded
    tensor = grpc.InferInput(spec.name, list(array.shape), "BYTES")
    tensor.set_data_from_numpy(array)
    return tensor


def _request_inputs(
    history: Iterable[str],
    exclude: Iterable[str] | None,
    candidates: Iterable[str] | None,
    top_k: int | None,
    user_id: str | None,
) -> list[grpc.InferInput]:
    inputs = [_text_input(HISTORY, history)]
    if exclude is not None:
        inputs.append(_text_input(EXCLUDE, exclude))
    if candidates is not None:
        inputs.append(_text_input(CANDIDATES, candidates))
    if user_id is not None:
        inputs.append(_text_input(USER_ID, [user_id]))
    if top_k is not None:
        if isinstance(top_k, bool) or not isinstance(top_k, int) or abs(top_k) > np.iinfo(np.int32).max:
            raise InvalidRequest(f"{TOP_K.name} is {top_k!r}: it is a whole number of at least 1")
        tensor = grpc.InferInput(TOP_K.name, [1, 1], "INT32")
        tensor.set_data_from_numpy(np.array([[top_k]], dtype=np.int32))
        inputs.append(tensor)
    return inputs


def _requested_outputs() -> list[grpc.InferRequestedOutput]:
    return [grpc.InferRequestedOutput(spec.name) for spec in RESPONSE]


def _recommendations(result: grpc.InferResult) -> list[Recommendation]:
    columns: list[NDArray[Any]] = [result.as_numpy(spec.name)[0] for spec in (ITEM_ID, SCORE, RETRIEVER_RANK)]
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [Recommendation(item_id.decode(), score, rank) for item_id, score, rank in rows]


def client_error(error: InferenceServerException, url: str, model: str, timeout: float) -> ClientError:
    """The error of this package that a gRPC status stands for."""
    status = str(error.status()).removeprefix("StatusCode.")
    # Triton puts "in ensemble 'llamarec', " before the message of the step that failed, which names the step itself.
    message = re.sub(r"^in ensemble '[^']*', ", "", error.message())
    if status == "INVALID_ARGUMENT":
        return InvalidRequest(message)
    if status == "DEADLINE_EXCEEDED":
        return RequestTimeout(f"no answer from {model} at {url} within {timeout:g} s: allow more time or ask for less")
    if status == "UNAVAILABLE" and "unknown model" not in message:
        return ServerUnavailable(f"no server answers at {url}: start one with `llamarec serve` ({message})")
    if status in ("UNAVAILABLE", "NOT_FOUND"):
        return ServerUnavailable(f"the server at {url} does not serve {model}: run `llamarec export` ({message})")
    return ServerError(f"{model} at {url} failed with {status}: {message}")


class Recommender:
    """A connection to a running server, for plain code; may be shared by threads.

    Args:
        url: ``host:port`` of the server's gRPC endpoint.
    """

    def __init__(self, url: str = DEFAULT_URL) -> None:
        self._url = url
        self._client = grpc.InferenceServerClient(url)

    def __enter__(self) -> "Recommender":
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
    ) -> list[Recommendation]:
        """Asks for one user's recommendations, best first.

        Args:
            history: raw ids of what the user took, oldest first; unknown ids are skipped, and it may be empty.
            exclude: raw ids never to return.
            candidates: raw ids to rank instead of retrieving.
            top_k: how many to return; all by default.
            user_id: for the server's logs; the models never see it.
            model: the ensemble to ask; ``llamarec_retrieval`` answers without the language model.
            timeout: seconds until the request is given up.

        Raises:
            InvalidRequest: the request is beyond one of the contract's limits; the text names the tensor.
            RequestTimeout: no answer in time.
            ServerUnavailable: nothing listens at the address, or the model is not loaded there.
            ServerError: the server failed.
        """
        inputs = _request_inputs(history, exclude, candidates, top_k, user_id)
        try:
            result = self._client.infer(model, inputs, outputs=_requested_outputs(), client_timeout=timeout)
        except InferenceServerException as error:
            raise client_error(error, self._url, model, timeout) from error
        return _recommendations(result)


class AsyncRecommender:
    """The same for asyncio: many requests may be under way at once, which the server batches.

    Args:
        url: ``host:port`` of the server's gRPC endpoint.
    """

    def __init__(self, url: str = DEFAULT_URL) -> None:
        self._url = url
        self._client = aio.InferenceServerClient(url)

    async def __aenter__(self) -> "AsyncRecommender":
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
    ) -> list[Recommendation]:
        """As :meth:`Recommender.recommend`; cancelling the task gives the request up."""
        inputs = _request_inputs(history, exclude, candidates, top_k, user_id)
        try:
            result = await self._client.infer(model, inputs, outputs=_requested_outputs(), client_timeout=timeout)
        except InferenceServerException as error:
            raise client_error(error, self._url, model, timeout) from error
        return _recommendations(result)
