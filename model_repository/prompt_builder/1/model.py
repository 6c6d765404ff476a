"""Triton step: history and candidates to a prompt."""

from typing import Any

from export.steps import Prompting, Worker


class TritonPythonModel:
    """See :class:`export.steps.Prompting`."""

    def initialize(self, args: dict[str, str]) -> None:
        self.worker = Worker("prompt_builder", args, Prompting.load)

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.worker.execute(requests)

    def finalize(self) -> None:
        self.worker.finalize()
