"""Triton model `neighbours`, the step of `similar`: returns the items nearest to an item."""

from functools import partial
from typing import Any

from serving.layout import store_address
from serving.steps.neighbours import NeighboursStep
from serving.steps.worker import Worker


class TritonPythonModel:
    """Runs :class:`serving.steps.neighbours.NeighboursStep` in Triton."""

    def initialize(self, args: dict[str, str]) -> None:
        self.worker = Worker.open("neighbours", args, partial(NeighboursStep.load, store=store_address(args)))

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.worker.execute(requests)

    def finalize(self) -> None:
        self.worker.finalize()
