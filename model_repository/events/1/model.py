"""Triton model `events`, beside the releases: records what users did."""

from typing import Any

from serving.layout import store_address
from serving.steps.events import EventsStep
from serving.steps.telemetry import Telemetry
from serving.steps.worker import Worker


class TritonPythonModel:
    """Runs :class:`serving.steps.events.EventsStep` in Triton."""

    def initialize(self, args: dict[str, str]) -> None:
        self.worker = Worker("events", EventsStep.open(store_address(args)), Telemetry("events", "none"))

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.worker.execute(requests)

    def finalize(self) -> None:
        self.worker.finalize()
