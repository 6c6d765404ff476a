"""Triton model of the `retriever` step: a history to its candidates."""

from typing import Any

from serving.contract import SCORES_PARAMETER
from serving.layout import parameter, store_address
from serving.steps.retriever import RetrieverStep
from serving.steps.worker import Worker


class TritonPythonModel:
    """Runs :class:`serving.steps.retriever.RetrieverStep` in Triton."""

    def initialize(self, args: dict[str, str]) -> None:
        scores_model, store = parameter(args, SCORES_PARAMETER), store_address(args)
        self.worker = Worker.open("retriever", args, lambda folder: RetrieverStep.load(folder, scores_model, store))

    def execute(self, requests: list[Any]) -> list[Any]:
        return self.worker.execute(requests)

    def finalize(self) -> None:
        self.worker.finalize()
