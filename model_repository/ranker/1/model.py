"""Triton step: prompt and candidates to the ranked answer."""

from typing import Any

from export.steps import CACHE_PARAMETER, Ranking, Worker, parameter


class TritonPythonModel:
    """See :class:`export.steps.Ranking`."""

    def initialize(self, args: dict[str, str]) -> None:
        remembered = int(parameter(args, CACHE_PARAMETER) or 0)
        self.worker = Worker("ranker", args, lambda folder: Ranking.load(folder, remembered))

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.worker.execute(requests)

    def finalize(self) -> None:
        self.worker.finalize()
