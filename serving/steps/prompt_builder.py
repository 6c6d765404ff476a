"""The `prompt_builder` step: history and candidates to the tokens of one prompt."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamarec_client.contract import TensorSpec
from models.ranker.prompt import PromptBuilder, listed
from serving.contract import (
    CANDIDATE_ITEM,
    CANDIDATE_TEXT,
    HISTORY_ITEM,
    HISTORY_TEXT,
    LINE_END,
    PREFIX,
    QUEUED,
    TOKEN,
)
from serving.live_items import LiveItems, open_items
from serving.steps.ranker_queue import now
from serving.steps.step import Answer, Tensors
from stores.store import Store


@dataclass(frozen=True)
class PromptBuilderStep:
    """Builds the prompt of a request."""

    items: LiveItems[PromptBuilder]
    exported: int
    """Number of items in the exported catalogue; added items follow."""

    @classmethod
    def load(cls, folder: Path, store: str | None = None) -> "PromptBuilderStep":
        """Open ``items.parquet``, ``tokenizer.json`` and ``prompt.json``.

        Args:
            folder: what `llamarec export` wrote.
            store: address of the store of items that are added while the server runs.
        """
        return cls.of(PromptBuilder.load(folder), open_items(folder, store))

    @classmethod
    def of(cls, prompts: PromptBuilder, store: Store | None = None) -> "PromptBuilderStep":
        """Return the step of a builder, and of a store of further items."""
        return cls(LiveItems(prompts, lambda now: prompts.with_added(now.added), store), prompts.items)

    def answer(self, request: Tensors) -> Answer:
        """Return the prompt; it has no tokens when there is no candidate to rank."""
        candidates = request[CANDIDATE_ITEM].tolist()
        if not candidates:
            return {TOKEN: [], LINE_END: [], PREFIX: [0], QUEUED: [now()]}
        history = request[HISTORY_ITEM].tolist()
        prompts = self.items.current(max(*history, *candidates, 0) - self.exported)
        prompt = prompts.build(
            _texts(request, HISTORY_TEXT) or history, listed(candidates, _texts(request, CANDIDATE_TEXT))
        )
        return {TOKEN: prompt.tokens, LINE_END: prompt.line_ends, PREFIX: [prompt.prefix], QUEUED: [now()]}

    def facts(self, request: Tensors, answer: Answer, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the length of the prompt."""
        return {"prompt_tokens": len(np.asarray(answer[TOKEN]))}


def _texts(request: Tensors, spec: TensorSpec) -> list[str]:
    """Return the titles of a tensor; none if the repository is of a version that does not have it."""
    return [raw.decode() for raw in request[spec].tolist()] if spec in request else []
