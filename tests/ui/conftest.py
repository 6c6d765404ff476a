"""Fixtures: the demo's page on the real server, and a headless Chromium."""

from collections.abc import Iterator

import pytest
import screenshots

from llamarec.page.app import DemoPage
from preprocessing.data import load_data


@pytest.fixture(scope="session")
def page(server, repository, artifacts) -> Iterator[str]:
    """Yield the address of the page, which uses the server with the tiny ranker."""
    with screenshots.showing(DemoPage.open(server.url, repository, load_data(artifacts))) as address:
        yield address


@pytest.fixture(scope="session")
def chromium():
    """Yield a browser with a new, empty profile."""
    with screenshots.chromium() as browser:
        yield browser
