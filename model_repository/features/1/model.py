"""Triton step: raw ids to the catalogue's numbers."""

from typing import Any

from export.steps import Features, answer_each, artifact_folder, unknown_items_counter

STEP = "features"


class TritonPythonModel:
    """See :class:`export.steps.Features`."""

    def initialize(self, args: dict[str, str]) -> None:
        self.step = Features.load(artifact_folder(STEP, args), unknown_items_counter())

    def execute(self, requests: list[Any]) -> list[Any]:
        return answer_each(STEP, self.step.answer, requests)
