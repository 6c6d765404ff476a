"""The errors that a request to the recommender can end with, as one small hierarchy.

::

    ClientError
    ├── InvalidRequest        change the request; the same one fails again
    ├── ServerUnavailable     nothing listens there, or the model is not loaded
    │   └── Overloaded        the queue is full: send less, or take the retriever's answer
    ├── RequestTimeout        no answer within the deadline
    └── ServerError           the server failed while answering
        └── StepDied          one step's process is gone; `llamarec serve` brings it back
"""


class ClientError(Exception):
    """Base of every error that this package raises on purpose: one sentence that names the remedy."""

    request_id: str = ""
    """Id of the request that failed, as in the server's logs; empty when none was sent."""


class InvalidRequest(ClientError):  # noqa: N818 - named as in the protocol: INVALID_ARGUMENT
    """The request cannot be answered as it stands; sending it again will not help."""


class ServerUnavailable(ClientError):  # noqa: N818 - named as in the protocol: UNAVAILABLE
    """Nothing listens at the address, or the model is not loaded there."""


class Overloaded(ServerUnavailable):
    """The server refused the request because its queue is full: send less, or later."""


class RequestTimeout(ClientError):  # noqa: N818 - as in the standard library's TimeoutError family
    """No answer within the deadline."""


class ServerError(ClientError):
    """The server failed while answering."""


class StepDied(ServerError):  # noqa: N818 - says what happened
    """The process of one step is gone; no request can pass that step until it is restarted."""
