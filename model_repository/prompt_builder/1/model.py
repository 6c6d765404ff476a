"""Triton model of the `prompt_builder` step: history and candidates to a prompt."""

from typing import Any

from serving.layout import store_address
from serving.steps.prompt_builder import PromptBuilderStep
from serving.steps.worker import Worker


class TritonPythonModel:
    """Runs :class:`serving.steps.prompt_builder.PromptBuilderStep` in Triton."""

    def initialize(self, args: dict[str, str]) -> None:
        store = store_address(args)
        self.worker = Worker.open("prompt_builder", args, lambda folder: PromptBuilderStep.load(folder, store))

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.worker.execute(requests)

    def finalize(self) -> None:
        self.worker.finalize()
