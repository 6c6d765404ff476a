"""Fixtures that give a test each kind of store."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stores.address import open_store
from stores.store import Store

KINDS = ["sqlite", pytest.param("redis", marks=[pytest.mark.redis, pytest.mark.thorough])]


@pytest.fixture(params=KINDS)
def store_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Yield the address of an empty store of each kind. Its file is in memory, where a commit takes no disk's time."""
    if request.param == "redis":
        yield request.getfixturevalue("redis_server").url
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield f"sqlite:///{Path(folder)}/histories.sqlite"


@pytest.fixture
def opened(store_url: str) -> Iterator[Callable[..., Store]]:
    """Yield a function that opens the store once more, with options of its address; all are closed at the end."""
    stores: list[Store] = []

    def another(options: str = "", **arguments: str) -> Store:
        stores.append(open_store(store_url + options, **arguments))
        return stores[-1]

    yield another
    for store in stores:
        store.close()
