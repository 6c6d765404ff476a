"""Fixture for the development data sets, whose tests are deselected if the folder is absent; plugins of support/."""

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("without deadlines", deadline=None)  # no test may fail because the machine is busy
settings.load_profile("without deadlines")

pytest_plugins = ["pipeline", "echo", "redis_server"]

SHARED_DATA = Path(__file__).resolve().parents[1] / "../shared/data"

LONGEST = "test_gpu_versions.py"
"""Name of the test file that takes the most time."""


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder with ``ml-latest-small`` and ``amazon-2014-beauty``.

    Tests that use it carry ``@pytest.mark.shared_data``.
    """
    return SHARED_DATA


def pytest_report_header() -> list[str]:
    return (
        [] if SHARED_DATA.is_dir() else ["shared data: ../shared/data is absent, the tests that read it are left out"]
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Of several files that run in parallel, the one that takes longest begins.
    items.sort(key=lambda item: item.path.name != LONGEST)
    if SHARED_DATA.is_dir():
        return
    absent = [item for item in items if item.get_closest_marker("shared_data")]
    config.hook.pytest_deselected(items=absent)
    items[:] = [item for item in items if item not in absent]
