"""Served answers against those of the steps in this process."""

from pathlib import Path

import pytest

from experiments.served_equals_offline import served_answers
from preprocessing.data import load_data
from serving.offline import ExportedSteps
from serving.server.local import LocalServer


@pytest.mark.thorough
def test_answers_are_equal_and_in_the_order_of_the_users(artifacts: Path, repository: Path, server: LocalServer):
    """Four users at once; their offline answers differ from each other."""
    data, steps = load_data(artifacts), ExportedSteps.load(repository)
    histories = [data.raw_history(user) for user in range(4)]
    expected = [steps.recommend(history) for history in histories]
    assert served_answers(server.url, histories, 4) == expected
    assert len({str(answer) for answer in expected}) == 4
