"""Errors that a request to the recommender can end with.

::

    ClientError
    ├── InvalidRequest        the request is invalid: change it before sending it again
    ├── ServerUnavailable     nothing listens at the address, or the model is not loaded
    │   └── Overloaded        the queue is full: send fewer requests, or fall back on the retriever
    ├── RequestTimeout        no answer within the deadline
    └── ServerError           the server failed while answering
        └── StepDied          the process of a step died; `llamarec serve` restarts it
"""


class ClientError(Exception):
    """Base of the errors of this package; each message is one sentence that names the remedy."""

    request_id: str = ""
    """Id of the failed request, as in the server's logs; empty if no request was sent."""


class InvalidRequest(ClientError):  # noqa: N818 - named as in the protocol: INVALID_ARGUMENT
    """The request is invalid; sending it again will not help."""


class ServerUnavailable(ClientError):  # noqa: N818 - named as in the protocol: UNAVAILABLE
    """Nothing listens at the address, or the model is not loaded there."""


class Overloaded(ServerUnavailable):
    """The server refused the request because its queue is full: send fewer requests, or retry later."""


class RequestTimeout(ClientError):  # noqa: N818 - as in the standard library's TimeoutError family
    """There was no answer within the deadline."""


class ServerError(ClientError):
    """The server failed while answering."""


class StepDied(ServerError):  # noqa: N818 - says what happened
    """The process of a step died; no request can pass that step until it is restarted."""
