"""Reads the time that requests spend in each step from the server's own statistics."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from llamarec_client.address import channel_options, check_address
from llamarec_client.messages import client_error
from llamarec_client.servers import Server

STATISTICS_TIMEOUT = 10.0


class StepTime(NamedTuple):
    """Mean time of a request in one step."""

    queue_ms: float
    compute_ms: float
    """Time of the step's own work, including the copies of its input and output tensors."""


class StepTotal(NamedTuple):
    """Running totals of a step since the server started."""

    requests: int
    queue_ns: int
    compute_ns: int


def ensemble_steps(url: str, model: str) -> list[str]:
    """Return the models that an ensemble runs, in order; for any other model, the model itself.

    Raises:
        ClientError: the server does not answer, or does not serve the model.
    """
    try:
        with _client(url) as client:
            config = client.get_model_config(model, client_timeout=STATISTICS_TIMEOUT).config
    except InferenceServerException as error:
        raise client_error(error, Server(url, url), model, STATISTICS_TIMEOUT) from error
    return [step.model_name for step in config.ensemble_scheduling.step] or [model]


def step_totals(url: str, steps: Sequence[str]) -> dict[str, StepTotal]:
    """Return the running totals of each step.

    Raises:
        ClientError: the server does not answer, or does not serve a step.
    """
    totals = {}
    with _client(url) as client:
        for step in steps:
            try:
                statistics = client.get_inference_statistics(step, client_timeout=STATISTICS_TIMEOUT)
            except InferenceServerException as error:
                raise client_error(error, Server(url, url), step, STATISTICS_TIMEOUT) from error
            times = [version.inference_stats for version in statistics.model_stats]
            totals[step] = StepTotal(
                sum(time.success.count for time in times),
                sum(time.queue.ns for time in times),
                sum(time.compute_input.ns + time.compute_infer.ns + time.compute_output.ns for time in times),
            )
    return totals


def _client(url: str) -> InferenceServerClient:
    return InferenceServerClient(check_address(url), channel_args=channel_options(url))


def mean_times(before: Mapping[str, StepTotal], after: Mapping[str, StepTotal]) -> dict[str, StepTime]:
    """Return the mean time per request in each step between two readings."""
    steps = {}
    for step, end in after.items():
        requests = max(end.requests - before[step].requests, 1)
        queue, compute = end.queue_ns - before[step].queue_ns, end.compute_ns - before[step].compute_ns
        steps[step] = StepTime(queue / requests / 1e6, compute / requests / 1e6)
    return steps
