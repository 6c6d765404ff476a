"""The `prompt_builder` step: history and candidates to the tokens of one prompt."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.ranker.prompt import PromptBuilder
from serving.contract import CANDIDATE_ITEM, HISTORY_ITEM, LINE_END, PREFIX, QUEUED, TOKEN
from serving.steps.ranker_queue import now
from serving.steps.step import Answer, Tensors


@dataclass(frozen=True)
class PromptBuilderStep:
    """Builds the prompt of a request."""

    prompts: PromptBuilder

    @classmethod
    def load(cls, folder: Path) -> "PromptBuilderStep":
        """Open ``items.parquet``, ``tokenizer.json`` and ``prompt.json``."""
        return cls(PromptBuilder.load(folder))

    def answer(self, request: Tensors) -> Answer:
        """Return the prompt; it has no tokens when there is no candidate to rank."""
        candidates = request[CANDIDATE_ITEM].tolist()
        if not candidates:
            return {TOKEN: [], LINE_END: [], PREFIX: [0], QUEUED: [now()]}
        prompt = self.prompts.build(request[HISTORY_ITEM].tolist(), candidates)
        return {TOKEN: prompt.tokens, LINE_END: prompt.line_ends, PREFIX: [prompt.prefix], QUEUED: [now()]}

    def facts(self, request: Tensors, answer: Answer, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the length of the prompt."""
        return {"prompt_tokens": len(np.asarray(answer[TOKEN]))}
