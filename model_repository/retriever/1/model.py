"""Triton step: history to candidates."""

from typing import Any

from export.steps import Retrieval, ServedScores, Worker


class TritonPythonModel:
    """See :class:`export.steps.Retrieval`."""

    def initialize(self, args: dict[str, str]) -> None:
        self.worker = Worker("retriever", args, lambda folder: Retrieval.load(folder, ServedScores.name(args)))

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.worker.execute(requests)

    def finalize(self) -> None:
        self.worker.finalize()
