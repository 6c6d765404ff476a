"""Reads the time that requests spend in each step from the server's own statistics."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from llamarec_client.address import DNS, channel_options, check_address, resolve
from llamarec_client.messages import client_error
from llamarec_client.servers import Server
from serving.errors import BenchmarkError

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


def step_totals_of_all(urls: Sequence[str], steps: Sequence[str]) -> dict[str, StepTotal]:
    """Return the running totals of each step, summed over several servers; see :func:`step_totals`."""
    each = [step_totals(url, steps) for url in urls]
    return {
        step: StepTotal(*(sum(column) for column in zip(*(totals[step] for totals in each), strict=True)))
        for step in steps
    }


def steps_of_all(urls: Sequence[str], model: str) -> list[str]:
    """Return the models that an ensemble runs on every one of several servers; see :func:`ensemble_steps`.

    Raises:
        ClientError: a server does not answer, or does not serve the model.
        BenchmarkError: the servers run different ones, because they serve different releases.
    """
    each = {url: ensemble_steps(url, model) for url in urls}
    first = each[urls[0]]
    for url, steps in each.items():
        if steps != first:
            raise BenchmarkError(
                f"{urls[0]} runs {', '.join(first)} for {model}, and {url} runs {', '.join(steps)}: promote one release"
                " on all servers first"
            )
    return first


def each_server(urls: Sequence[str]) -> list[str]:
    """Return the address of every server, of which those that begin with ``dns:///`` may name several.

    Raises:
        BenchmarkError: a name cannot be resolved.
    """
    found = []
    for url in urls:
        try:
            found += resolve(url.removeprefix(DNS)) if check_address(url).startswith(DNS) else [url]
        except OSError as error:
            raise BenchmarkError(f"{url} cannot be resolved ({error}): check the name, or give addresses") from None
    return list(dict.fromkeys(found))


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
