"""What can go wrong between a service and the recommender, as one small hierarchy."""


class ClientError(Exception):
    """Base of every error this package raises on purpose: one sentence that says what to do."""


class InvalidRequest(ClientError):  # noqa: N818 - named as in the protocol: INVALID_ARGUMENT
    """The request cannot be answered as it stands; sending it again will not help."""


class ServerUnavailable(ClientError):  # noqa: N818 - named as in the protocol: UNAVAILABLE
    """Nothing listens at the address, or the model is not loaded there."""


class RequestTimeout(ClientError):  # noqa: N818 - as in the standard library's TimeoutError family
    """No answer within the deadline."""


class ServerError(ClientError):
    """The server failed while answering, or could not be started."""


class BenchmarkError(ClientError):
    """perf_analyzer is missing or gave no measurement."""
