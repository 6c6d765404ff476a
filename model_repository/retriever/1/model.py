"""Triton step: history to candidates."""

from typing import Any

from export.steps import SCORES_PARAMETER, Retrieval, Worker, parameter


class TritonPythonModel:
    """See :class:`export.steps.Retrieval`."""

    def initialize(self, args: dict[str, str]) -> None:
        scores = parameter(args, SCORES_PARAMETER)
        self.worker = Worker("retriever", args, lambda folder: Retrieval.load(folder, scores))

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.worker.execute(requests)

    def finalize(self) -> None:
        self.worker.finalize()
