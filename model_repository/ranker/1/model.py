"""Triton step: prompt and candidates to the ranked answer."""

from typing import Any

from export.steps import Ranking, Worker


class TritonPythonModel:
    """See :class:`export.steps.Ranking`."""

    def initialize(self, args: dict[str, str]) -> None:
        self.worker = Worker("ranker", args, Ranking.load)

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.worker.execute(requests)

    def finalize(self) -> None:
        self.worker.finalize()
