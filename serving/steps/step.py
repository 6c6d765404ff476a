"""Defines a step: an object that answers the tensors of one request, and reports what to count and log about it."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from numpy.typing import ArrayLike, NDArray

from llamarec_client.contract import DEGRADED, DEGRADED_REASONS, TensorSpec

Tensors = Mapping[TensorSpec, NDArray[Any]]
"""Arrays [n] of one request, without the batch dimension; an optional tensor that was not sent is absent."""
Answer = Mapping[TensorSpec, ArrayLike]


class Step(Protocol):
    """The work of one Triton model. Importable and tested without a server."""

    def answer(self, request: Tensors) -> Answer:
        """Return the step's outputs for its inputs.

        Raises:
            InputError: the request is refused; the text names the tensor.
        """

    def facts(self, request: Tensors, answer: Answer, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what is counted and logged about an answer.

        Args:
            request: the inputs.
            answer: the outputs.
            parameters: the request's parameters.

        Returns:
            ``candidates``, ``prompt_tokens``, ``unknown_items``, ``new_events`` and ``degraded`` become metrics;
            everything is logged.
        """


@runtime_checkable
class JointStep(Protocol):
    """A step that does the work of all requests of a batch at once, where that takes as long as that of one."""

    def answer_all(self, requests: Sequence[Tensors]) -> Sequence[Answer | Exception]:
        """Return for each request the step's outputs, or the error with which this request alone is refused."""

    def facts(self, request: Tensors, answer: Answer, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what is counted and logged about an answer; see :meth:`Step.facts`."""


@runtime_checkable
class CheckedStep(Protocol):
    """A step whose answer may be none of an ensemble that asks for it."""

    def check(self, answer: Answer, wanted: Collection[str]) -> None:
        """Check an answer before it is sent.

        Args:
            answer: all outputs.
            wanted: names of the outputs that are asked for, by which an ensemble is known.

        Raises:
            InputError: the request is refused; the text names the tensor.
        """


def degraded_reason(parameters: Mapping[str, Any]) -> str | None:
    """Return why the client asked for a fallback, from the request's parameters; None if it did not."""
    reason: str | None = parameters.get(DEGRADED)
    if reason is not None and reason not in DEGRADED_REASONS:
        return "other"  # each value of a label is a series of its own, and the caller chose this one
    return reason


def cut(limit: NDArray[Any], *arrays: NDArray[Any]) -> list[NDArray[Any]]:
    """Return the first LIMIT entries of each array; all of them when LIMIT is 0."""
    return [array[: int(limit[0]) or None] for array in arrays]
