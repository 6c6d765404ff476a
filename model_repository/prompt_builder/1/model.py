"""Triton step: history and candidates to a prompt."""

from typing import Any

from export.steps import Prompting, answer_each, artifact_folder

STEP = "prompt_builder"


class TritonPythonModel:
    """See :class:`export.steps.Prompting`."""

    def initialize(self, args: dict[str, str]) -> None:
        self.step = Prompting.load(artifact_folder(STEP, args))

    def execute(self, requests: list[Any]) -> list[Any]:
        return answer_each(STEP, self.step.answer, requests)
