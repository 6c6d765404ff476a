"""The page over the real server, and a headless Chromium to look at it."""

from collections.abc import Iterator

import pytest

from benchmarks import screenshots
from llamarec.ui import Showroom
from preprocessing.data import load_data


@pytest.fixture(scope="session")
def page(server, repository, artifacts) -> Iterator[str]:
    """The address of the page over the tiny ranker's server."""
    with screenshots.showing(Showroom.open(server.url, repository, load_data(artifacts))) as address:
        yield address


@pytest.fixture(scope="session")
def chromium():
    """A browser with a new, empty profile."""
    with screenshots.chromium() as browser:
        yield browser
