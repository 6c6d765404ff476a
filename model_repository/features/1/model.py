"""Triton model of the `features` step: raw ids to item numbers."""

from typing import Any

from serving.layout import store_address
from serving.steps.features import FeaturesStep
from serving.steps.worker import Worker


class TritonPythonModel:
    """Runs :class:`serving.steps.features.FeaturesStep` in Triton."""

    def initialize(self, args: dict[str, str]) -> None:
        store = store_address(args)
        self.worker = Worker.open("features", args, lambda folder: FeaturesStep.load(folder, store))

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.worker.execute(requests)

    def finalize(self) -> None:
        self.worker.finalize()
