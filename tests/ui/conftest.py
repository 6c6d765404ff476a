"""The page over the real server, and a headless Chromium to look at it."""

from collections.abc import Iterator

import pytest
import screenshots

from llamarec.page.app import DemoPage
from preprocessing.data import load_data


@pytest.fixture(scope="session")
def page(server, repository, artifacts) -> Iterator[str]:
    """The address of the page over the tiny ranker's server."""
    with screenshots.showing(DemoPage.open(server.url, repository, load_data(artifacts))) as address:
        yield address


@pytest.fixture(scope="session")
def chromium():
    """A browser with a new, empty profile."""
    with screenshots.chromium() as browser:
        yield browser
