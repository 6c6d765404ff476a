"""Triton model of the `ranker` step: prompt and candidates to the ranked answer."""

from typing import Any

from serving.contract import CACHE_PARAMETER, PREFIX_CACHE_PARAMETER
from serving.layout import instance_device, parameter
from serving.steps.ranker import RankerStep
from serving.steps.worker import Worker


class TritonPythonModel:
    """Runs :class:`serving.steps.ranker.RankerStep` in Triton."""

    def initialize(self, args: dict[str, str]) -> None:
        cached = int(parameter(args, CACHE_PARAMETER) or 0)
        prefixes = int(parameter(args, PREFIX_CACHE_PARAMETER) or 0)
        device = instance_device(args)
        self.worker = Worker.open("ranker", args, lambda folder: RankerStep.load(folder, cached, device, prefixes))

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.worker.execute(requests)

    def finalize(self) -> None:
        self.worker.finalize()
