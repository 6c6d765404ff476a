"""Marks the tests that start servers under load and kill parts of them; `make test-serving` runs them.

`make test` does not.
"""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.serving)
