"""Triton model `items`, beside the releases: adds, hides and shows items."""

from typing import Any

from serving.admin_key import known_digest
from serving.layout import store_address
from serving.steps.items import ItemsStep
from serving.steps.telemetry import Telemetry
from serving.steps.worker import Worker


class TritonPythonModel:
    """Runs :class:`serving.steps.items.ItemsStep` in Triton."""

    def initialize(self, args: dict[str, str]) -> None:
        self.worker = Worker("items", ItemsStep.open(store_address(args), known_digest()), Telemetry("items", "none"))

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.worker.execute(requests)

    def finalize(self) -> None:
        self.worker.finalize()
