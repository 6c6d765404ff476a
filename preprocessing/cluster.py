"""Connects to a Dask cluster, whose workers see the same files as this process."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from preprocessing.errors import InputError


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Yield a ``distributed.Client`` of the scheduler at ``address``; Dask's work within the block goes there.

    Raises:
        InputError: no scheduler answers.
    """
    try:
        from distributed import Client
    except ModuleNotFoundError:
        raise InputError("a Dask cluster needs dask.distributed: pip install 'llamarec[train]'") from None
    try:
        client = Client(address, timeout=10, set_as_default=True)
    except (OSError, ValueError) as error:
        raise InputError(
            f"no Dask scheduler answers at {address} ({error}): start one with `dask scheduler`, or leave out"
            " --scheduler-address"
        ) from None
    with client:
        yield client
