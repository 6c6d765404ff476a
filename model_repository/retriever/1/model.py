"""Triton step: history to candidates."""

from typing import Any

from export.steps import Retrieval, answer_each, artifact_folder

STEP = "retriever"


class TritonPythonModel:
    """See :class:`export.steps.Retrieval`."""

    def initialize(self, args: dict[str, str]) -> None:
        self.step = Retrieval.load(artifact_folder(STEP, args))

    def execute(self, requests: list[Any]) -> list[Any]:
        return answer_each(STEP, self.step.answer, requests)
