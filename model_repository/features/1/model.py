"""Triton model of the `features` step: raw ids to item numbers."""

from typing import Any

from serving.steps.features import FeaturesStep
from serving.steps.worker import Worker


class TritonPythonModel:
    """Runs :class:`serving.steps.features.FeaturesStep` in Triton."""

    def initialize(self, args: dict[str, str]) -> None:
        self.worker = Worker.open("features", args, FeaturesStep.load)

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.worker.execute(requests)

    def finalize(self) -> None:
        self.worker.finalize()
