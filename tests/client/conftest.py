"""A server whose steps only echo: for tests of the protocol."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from echo import write_echo

from client.server import LocalServer
from export.config import Serving, write_configs


@pytest.fixture(scope="session")
def echo_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with the committed configurations and echoing steps."""
    repository = tmp_path_factory.mktemp("echo")
    write_configs(repository, Serving(pass_seconds=0.01, queue_seconds=60))
    write_echo(repository)
    return repository


@pytest.fixture(scope="session")
def echo_server(echo_repository: Path) -> Iterator[LocalServer]:
    """A running server over it."""
    with LocalServer(echo_repository) as server:
        yield server
