"""Triton model of the `prompt_builder` step: history and candidates to a prompt."""

from typing import Any

from serving.steps.prompt_builder import PromptBuilderStep
from serving.steps.worker import Worker


class TritonPythonModel:
    """Runs :class:`serving.steps.prompt_builder.PromptBuilderStep` in Triton."""

    def initialize(self, args: dict[str, str]) -> None:
        self.worker = Worker.open("prompt_builder", args, PromptBuilderStep.load)

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.worker.execute(requests)

    def finalize(self) -> None:
        self.worker.finalize()
