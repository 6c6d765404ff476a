"""Failures of operating a server: starting it, releasing to it, measuring it.

::

    ServingError
    ├── ServerFailure       the server could not be started, or refused what was asked of it
    ├── ServerUnreachable   no server runs there, or it does not answer
    ├── ReleaseError        there is no such release, or it is not what was built
    └── BenchmarkError      perf_analyzer is missing or gave no measurement

Errors of requests to the recommender are in ``llamarec_client.errors``.
"""


class ServingError(Exception):
    """Base of these errors; each message is one sentence that names the remedy."""


class ServerFailure(ServingError):  # noqa: N818 - says what happened
    """The server could not be started, or refused what was asked of it."""


class ServerUnreachable(ServingError):  # noqa: N818 - says what happened
    """No server runs there, or it does not answer."""


class ReleaseError(ServingError):
    """There is no such release, or it is not what was built."""


class BenchmarkError(ServingError):
    """perf_analyzer is missing or gave no measurement."""
