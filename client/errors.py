"""What can go wrong between a service and the recommender, as one small hierarchy.

::

    ClientError
    ├── InvalidRequest        change the request; the same one fails again
    ├── ServerUnavailable     nothing listens there, or the model is not loaded
    │   └── Overloaded        the queue is full: send less, or take the retriever's answer
    ├── RequestTimeout        no answer within the deadline
    ├── ServerError           the server failed while answering
    │   └── StepDied          one step's process is gone; `llamarec serve` brings it back
    └── BenchmarkError        perf_analyzer gave no measurement
"""


class ClientError(Exception):
    """Base of every error this package raises on purpose: one sentence that says what to do."""

    request_id: str = ""
    """Of the request that failed, as the server logs it; empty where none was sent."""


class InvalidRequest(ClientError):  # noqa: N818 - named as in the protocol: INVALID_ARGUMENT
    """The request cannot be answered as it stands; sending it again will not help."""


class ServerUnavailable(ClientError):  # noqa: N818 - named as in the protocol: UNAVAILABLE
    """Nothing listens at the address, or the model is not loaded there."""


class Overloaded(ServerUnavailable):
    """The server refused the request because too many wait before it: send less, or later."""


class RequestTimeout(ClientError):  # noqa: N818 - as in the standard library's TimeoutError family
    """No answer within the deadline."""


class ServerError(ClientError):
    """The server failed while answering, or could not be started."""


class StepDied(ServerError):  # noqa: N818 - says what happened
    """The process of one step is gone, so no request gets through it until it is brought back."""


class BenchmarkError(ClientError):
    """perf_analyzer is missing or gave no measurement."""
