"""Triton step: raw ids to the catalogue's numbers."""

from typing import Any

from export.steps import Features, Worker


class TritonPythonModel:
    """See :class:`export.steps.Features`."""

    def initialize(self, args: dict[str, str]) -> None:
        self.worker = Worker("features", args, Features.load)

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.worker.execute(requests)

    def finalize(self) -> None:
        self.worker.finalize()
