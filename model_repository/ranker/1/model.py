"""Triton step: prompt and candidates to the ranked answer."""

from typing import Any

from export.steps import Ranking, answer_each, artifact_folder

STEP = "ranker"


class TritonPythonModel:
    """See :class:`export.steps.Ranking`."""

    def initialize(self, args: dict[str, str]) -> None:
        self.step = Ranking.load(artifact_folder(STEP, args))

    def execute(self, requests: list[Any]) -> list[Any]:
        return answer_each(STEP, self.step.answer, requests)
