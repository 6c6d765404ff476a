"""Converts requests to ``similar`` and its answers between Python objects and the contract's tensors."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from llamarec_client.checks import text, whole_number
from llamarec_client.contract import ITEM, ITEM_ID, MAX_SIMILAR, SCORE, SIMILAR, TITLES, TOP_K, TRANSITIONS
from llamarec_client.errors import ServerError


@dataclass(frozen=True)
class SimilarItem:
    """One item that is like another."""

    item_id: str
    """The raw id, as in the interaction log."""
    score: float
    """Weighted sum of ``transitions`` and ``titles``, by which the items are ordered."""
    transitions: float
    """log(1 + the number of times that it followed the other item in the training sequences, near ones counting more).
    0 if it never did, or if the release does not know."""
    titles: float
    """Cosine similarity of the words of both titles, from 0 to 1; 0 if the release does not know them."""


def similar_inputs(item_id: str, top_k: int) -> list[grpc.InferInput]:
    """Return the tensors of a request to ``similar``, with a leading batch dimension of 1.

    Raises:
        InvalidRequest: an argument is not what it has to be; the message names it.
    """
    item = grpc.InferInput(ITEM.name, [1, 1], "BYTES")
    item.set_data_from_numpy(np.array([[text("item_id", item_id).encode()]], dtype=object))
    count = grpc.InferInput(TOP_K.name, [1, 1], TOP_K.data_type)
    count.set_data_from_numpy(np.array([[whole_number(TOP_K.name, top_k, MAX_SIMILAR)]], dtype=np.int32))
    return [item, count]


def read_similar(result: grpc.InferResult) -> list[SimilarItem]:
    """Return the rows of an answer.

    Raises:
        ServerError: the answer does not follow the contract.
    """
    try:
        specs = (ITEM_ID, SCORE, TRANSITIONS, TITLES)
        columns: list[NDArray[Any]] = [result.as_numpy(spec.name)[0] for spec in specs]
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [SimilarItem(item_id.decode(), *signals) for item_id, *signals in rows]
    except (AttributeError, IndexError, TypeError, ValueError, InferenceServerException) as error:
        raise ServerError(f"the answer of {SIMILAR} does not follow the contract ({error})") from error
