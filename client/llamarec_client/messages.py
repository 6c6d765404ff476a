"""Converts requests and answers between Python objects and the contract's tensors."""

import operator
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from llamarec_client.address import proxy_variable
from llamarec_client.checks import is_unicode, same_length, whole_number
from llamarec_client.contract import (
    ACTION,
    ADD,
    CANDIDATE_TITLE,
    CANDIDATES,
    EVENT_USER,
    EXCLUDE,
    HISTORY,
    HISTORY_TITLE,
    ITEM_ID,
    ITEMS,
    KEY,
    KIND,
    POLICY,
    RESPONSE,
    RETRIEVER_RANK,
    SCORE,
    TIMESTAMP,
    TITLE,
    TOP_K,
    USER_ID,
    TensorSpec,
)
from llamarec_client.errors import (
    ClientError,
    InvalidRequest,
    Overloaded,
    RequestTimeout,
    ServerError,
    ServerUnavailable,
    StepDied,
)
from llamarec_client.policy import Policy
from llamarec_client.servers import Server

OTHER_CONTRACT = re.compile(
    r"(\[request id: .*?\] )?("
    r"unexpected inference (input|output) '|unexpected shape for input '|inference input '.*?' data-type is '"
    r"|expected (number of inputs between )?\d+ (and \d+ but got|inputs but got))"
)
"""Messages of Triton itself, not of a step, when a request's tensors are not those of the model."""


@dataclass(frozen=True)
class Request:
    """A request for one user's recommendations."""

    history: Sequence[str] | None = None
    """Raw ids of the user's items, oldest first. Unknown ids are skipped; the history may be empty. Without one, the
    server looks up ``user_id`` in its store."""
    exclude: Sequence[str] | None = None
    """Raw ids that must not be returned."""
    candidates: Sequence[str] | None = None
    """Raw ids to rank instead of retrieving."""
    top_k: int | None = None
    """Number of items to return. Default: all."""
    user_id: str | None = None
    """User id, for the server's logs and to look up the history if there is none; the models do not use it."""
    history_titles: Sequence[str] | None = None
    """A title for each id in ``history``, which the language model reads; "" for the catalogue's. Without ids, these
    texts are the history."""
    candidate_titles: Sequence[str] | None = None
    """A title for each of ``candidates``; "" for the catalogue's. Without ids, these texts are ranked, and the
    ``item_id`` of each is its place, from "0"."""
    policy: Policy | None = None
    """Rules about groups, boosts and repeats. Default: the policy of the server's release, if it has one."""

    def inputs(self) -> list[grpc.InferInput]:
        """Return the request's tensors, with a leading batch dimension of 1.

        Raises:
            InvalidRequest: a value does not fit its tensor, which the message names, there are not as many titles as
                ids, or there is neither a history nor a user.
        """
        if self.history is None and self.user_id is None and self.history_titles is None:
            raise InvalidRequest(
                f"{HISTORY.name} is None, and so is {USER_ID.name}: give a list of item ids, which may be empty, or"
                " a user_id"
            )
        inputs = _titled_inputs(HISTORY, self.history, HISTORY_TITLE, self.history_titles)
        if self.exclude is not None:
            inputs.append(_text_input(EXCLUDE, self.exclude))
        inputs += _titled_inputs(CANDIDATES, self.candidates, CANDIDATE_TITLE, self.candidate_titles)
        if self.user_id is not None:
            inputs.append(_text_input(USER_ID, [self.user_id]))
        if self.top_k is not None:
            top_k = whole_number(TOP_K.name, self.top_k, 2**31 - 1)
            tensor = grpc.InferInput(TOP_K.name, [1, 1], "INT32")
            tensor.set_data_from_numpy(np.array([[top_k]], dtype=np.int32))
            inputs.append(tensor)
        if self.policy is not None:
            if not isinstance(self.policy, Policy):
                raise InvalidRequest(f"policy is {short(self.policy)}: give a Policy")
            inputs.append(_text_input(POLICY, [self.policy.text()]))
        return inputs


def are_texts(inputs: Iterable[grpc.InferInput]) -> bool:
    """Return whether the candidates of a request are texts without ids, none of which the retriever knows."""
    lengths = {tensor.name(): tensor.shape()[1] for tensor in inputs}
    return CANDIDATE_TITLE.name in lengths and not lengths.get(CANDIDATES.name)


def event_inputs(
    user_id: str, item_ids: Sequence[str], timestamps: Sequence[int] | None, kinds: Sequence[str] | None
) -> list[grpc.InferInput]:
    """Return the tensors of a request to ``events``.

    Without ``timestamps`` the events took place in the last milliseconds, one in each. Since the times are chosen here,
    the server recognises the events of a request that is sent again.

    Raises:
        InvalidRequest: a value does not fit its tensor, which the message names.
    """
    inputs = [_text_input(EVENT_USER, [user_id]), _text_input(ITEM_ID, item_ids)]
    if timestamps is None:
        now, count = time.time_ns() // 1_000_000, inputs[1].shape()[1]
        timestamps = range(now + 1 - count, now + 1)
    inputs.append(_time_input(timestamps))
    if kinds is not None:
        inputs.append(_text_input(KIND, kinds))
    return inputs


def added_inputs(titles: Mapping[str, str], key: str) -> list[grpc.InferInput]:
    """Return the tensors of a request to ``items`` that adds items.

    Raises:
        InvalidRequest: an argument is not what it has to be; the message names it or its tensor.
    """
    if not isinstance(titles, Mapping):
        raise InvalidRequest(f"titles is {short(titles)}: give a dict with the title of each item id")
    return [*listed_inputs(ADD, [*titles], key), _text_input(TITLE, titles.values(), "titles")]


def listed_inputs(action: str, item_ids: Iterable[str], key: str) -> list[grpc.InferInput]:
    """Return the tensors of a request to ``items`` that needs no titles.

    Raises:
        InvalidRequest: an argument is not what it has to be; the message names it or its tensor, but never shows the
            key.
    """
    if not isinstance(key, str) or not key or not is_unicode(key):
        raise InvalidRequest(
            "key is no text, or an empty one: give the admin key of the server, which is in LLAMAREC_ADMIN_KEY or in"
            " .serve.json of its repository"
        )
    return [_text_input(ACTION, [action]), _text_input(ITEM_ID, item_ids), _text_input(KEY, [key])]


@dataclass(frozen=True)
class Recommendation:
    """One recommended item."""

    item_id: str
    """The raw id, as in the interaction log."""
    score: float
    """Probability among the candidates; all of them sum to 1 before ``top_k`` shortens the list."""
    retriever_rank: int
    """The retriever's rank of the item among the candidates, from 1; 0 if the retriever does not know it."""


class Recommendations(list[Recommendation]):
    """One user's recommendations, best first, with facts about the answer.

    Args:
        items: the recommendations, best first.
        model: the ensemble that answered.
        degraded: whether the fallback answered, because the requested model did not.
        request_id: id of the request, as in the server's logs.
    """

    def __init__(self, items: Iterable[Recommendation], *, model: str, degraded: bool, request_id: str) -> None:
        super().__init__(items)
        self.model = model
        self.degraded = degraded
        self.request_id = request_id


def requested_outputs(response: Sequence[TensorSpec] = RESPONSE) -> list[grpc.InferRequestedOutput]:
    """Return the output tensors of the ensembles, or of another model."""
    return [grpc.InferRequestedOutput(spec.name) for spec in response]


def read_result(result: grpc.InferResult) -> list[Recommendation]:
    """Return the rows of an answer.

    Raises:
        ServerError: the answer does not follow the contract.
    """
    try:
        columns: list[NDArray[Any]] = [result.as_numpy(spec.name)[0] for spec in (ITEM_ID, SCORE, RETRIEVER_RANK)]
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [Recommendation(item_id.decode(), score, rank) for item_id, score, rank in rows]
    except (AttributeError, IndexError, TypeError, ValueError, InferenceServerException) as error:
        raise ServerError(
            f"the answer does not follow the contract: call an ensemble that `llamarec export` made ({error})"
        ) from error


def read_count(result: grpc.InferResult, spec: TensorSpec, model: str) -> int:
    """Return the number in a tensor of an answer of ``events`` or ``items``.

    Raises:
        ServerError: the answer does not follow the contract.
    """
    try:
        return int(result.as_numpy(spec.name)[0, 0])
    except (IndexError, TypeError, ValueError, InferenceServerException) as error:
        raise ServerError(f"the answer of {model} does not follow the contract ({error})") from error


def client_error(
    error: InferenceServerException, server: Server, model: str, timeout: float, *, several: bool = False
) -> ClientError:
    """Return the error of this package that corresponds to a gRPC status.

    Args:
        error: tritonclient's error.
        server: the server that was asked.
        model: the model that was asked.
        timeout: seconds that the call may take.
        several: whether there are other servers, at which a request may succeed that does not fit this server's models.
    """
    url = server.address
    proxy = proxy_variable(server.name) and proxy_variable(url)
    status = str(error.status()).removeprefix("StatusCode.")
    # Triton puts "in ensemble 'llamarec', " before the message of the step that failed, which names the step itself.
    message = re.sub(r"^in ensemble '[^']*', ", "", error.message() or "")
    if status == "INVALID_ARGUMENT" and several and OTHER_CONTRACT.match(message):
        return ServerUnavailable(
            f"the server at {url} serves {model} with another contract than this client's: run `llamarec export` of the"
            f" client's version, and restart it ({message})"
        )
    if status == "INVALID_ARGUMENT":
        return InvalidRequest(message)
    if status == "DEADLINE_EXCEEDED":
        through = f" through the proxy of {proxy}" if proxy else ""
        return RequestTimeout(
            f"no answer from {model} at {url}{through} within {timeout:g} s: allow more time or retry later"
        )
    if status == "UNAVAILABLE" and re.search("queue (full|timeout)", message):
        return Overloaded(f"{model} at {url} is overloaded: send fewer requests or retry later ({message})")
    if status == "UNAVAILABLE" and (dead := re.match(r"\w+: step (\w+) is dead", message)):
        return StepDied(f"the process of step {dead[1]} of {model} at {url} is dead ({message})")
    if status == "UNAVAILABLE" and re.match(r"\w+: the store ", message):
        task = "change items" if model == ITEMS else "look up or record events"
        return ServerUnavailable(f"{model} at {url} cannot {task}: {message}")
    if status == "UNAVAILABLE" and "unknown model" not in message:
        return ServerUnavailable(f"{_no_connection(url, proxy, message)} ({message})")
    if status in ("UNAVAILABLE", "NOT_FOUND"):
        return ServerUnavailable(f"the server at {url} does not serve {model}: run `llamarec export` ({message})")
    if status == "INTERNAL" and "Stub process" in message:
        step = re.search(r"Stub process '([^']*?)(?:_\d+_\d+)?' is not healthy", message)
        name = step[1] if step else "?"
        return StepDied(
            f"the process of step {name} is dead: `llamarec serve` restarts it within seconds, a bare tritonserver"
            f" must be restarted ({message})"
        )
    return ServerError(f"{model} at {url} failed with {status}: {message}")


def _no_connection(url: str, proxy: str | None, message: str) -> str:
    """Return why gRPC could not connect, and the remedy, from its own message."""
    if proxy:
        return f"no server answers at {url} through the proxy of {proxy}: unset {proxy}, or add the host to no_proxy"
    if re.search("resolving|DNS", message):
        return f"the host name of {url} cannot be resolved: check it"
    if "handshake" in message.lower():
        return f"the TLS handshake with {url} failed: check port and certificates, or leave tls out for a plain server"
    if "failed to connect" in message and re.search("Socket closed|HTTP/2|http1|SETTINGS|recvmsg", message):
        return (
            f"what listens at {url} does not speak plain gRPC: give the gRPC port (by default 8001, while 8000 is HTTP"
            f" and 8002 metrics), or tls for an encrypted server"
        )
    return f"no server answers at {url}: start one with `llamarec serve`"


def _time_input(timestamps: Iterable[int]) -> grpc.InferInput:
    """Return TIMESTAMP.

    Raises:
        InvalidRequest: a value is no whole number of 64 bits.
    """
    try:
        numbers = [operator.index(value) for value in timestamps]
        array = np.array([numbers], dtype=np.int64)
    except (TypeError, OverflowError):
        raise InvalidRequest(
            f"{TIMESTAMP.name} is {short(timestamps)}: give a list of whole numbers, milliseconds since 1970, UTC"
        ) from None
    tensor = grpc.InferInput(TIMESTAMP.name, list(array.shape), TIMESTAMP.data_type)
    tensor.set_data_from_numpy(array)
    return tensor


def _titled_inputs(
    spec: TensorSpec, ids: Sequence[str] | None, title_spec: TensorSpec, titles: Sequence[str] | None
) -> list[grpc.InferInput]:
    """Return the inputs of ids and of their titles, of which either may be absent.

    Raises:
        InvalidRequest: a value is not a string, or there are ids and not as many titles.
    """
    inputs = [] if ids is None else [_text_input(spec, ids)]
    if titles is None:
        return inputs
    titled = _text_input(title_spec, titles, "titles")
    if inputs and (count := inputs[0].shape()[1]):
        same_length(spec.name, count, title_spec.name, titled.shape()[1])
    return [*inputs, titled]


def _text_input(spec: TensorSpec, values: Iterable[str], meaning: str = "item ids") -> grpc.InferInput:
    """Return the STRING input of one request.

    Args:
        spec: the tensor.
        values: its strings.
        meaning: what they are, for messages.

    Raises:
        InvalidRequest: a value is not a string, or cannot be encoded as UTF-8.
    """
    if isinstance(values, (str, bytes)):
        raise InvalidRequest(f"{spec.name} is one string: give a list of {meaning}")
    try:
        given = list(values)
    except TypeError:
        raise InvalidRequest(f"{spec.name} is {short(values)}: give a list of {meaning}") from None
    encoded = []
    for value in given:
        if not isinstance(value, str) or not is_unicode(value):
            raise InvalidRequest(f"{spec.name} holds {short(value)}: {meaning} are strings of valid Unicode")
        encoded.append(value.encode())
    array = np.empty((1, len(encoded)), dtype=object)
    array[0] = encoded
    tensor = grpc.InferInput(spec.name, list(array.shape), "BYTES")
    tensor.set_data_from_numpy(array)
    return tensor
