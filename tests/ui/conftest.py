"""Fixtures: the demo's page on the real server, and a headless Chromium."""

from collections.abc import Iterator

import pytest
import screenshots

from llamarec.page.app import DemoPage
from preprocessing.data import load_data
from preprocessing.errors import InputError


@pytest.fixture(scope="session")
def page(server, repository, artifacts) -> Iterator[str]:
    """Yield the address of the page, which uses the server with the tiny ranker."""
    with screenshots.showing(DemoPage.open(server.url, repository, load_data(artifacts))) as address:
        yield address


def pytest_collection_finish(session: pytest.Session) -> None:
    """End with one sentence, before any server is started, where a test is to open a browser and there is none."""
    if any("chromium" in getattr(item, "fixturenames", ()) for item in session.items):
        try:
            screenshots.programs()
        except InputError as error:
            pytest.exit(str(error), returncode=2)


@pytest.fixture(scope="session")
def chromium():
    """Yield a browser with a new, empty profile."""
    with screenshots.chromium() as browser:
        yield browser
