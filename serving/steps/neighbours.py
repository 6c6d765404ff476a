"""The `neighbours` step, the only one of the ensemble `similar`: an item to the items that are nearest to it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamarec_client.contract import ITEM, ITEM_ID, SCORE, TITLES, TOP_K, TRANSITIONS
from serving.contract import PROBE
from serving.live_items import LiveItems, open_items
from serving.similar import SimilarItem, SimilarItems
from serving.steps.step import Answer, Tensors
from stores.store import Store


@dataclass(frozen=True)
class NeighboursStep:
    """Returns the items nearest to an item, with what each signal says."""

    items: LiveItems[SimilarItems]

    @classmethod
    def load(cls, folder: Path, store: str | None = None) -> "NeighboursStep":
        """Open the retriever's exported files, except its graph.

        Args:
            folder: the retriever's, which `llamarec export` wrote.
            store: address of the store of items that are added and hidden while the server runs.

        Raises:
            InputError: the address is not one of a store.
        """
        return cls.of(SimilarItems.load(folder), open_items(folder, store))

    @classmethod
    def of(cls, similar: SimilarItems, store: Store | None = None) -> "NeighboursStep":
        """Return the step of what finds similar items, and of a store of further items."""
        return cls(LiveItems(similar, similar.with_items, store))

    def answer(self, request: Tensors) -> Answer:
        """Return the nearest items, best first.

        Raises:
            InputError: see :meth:`serving.similar.SimilarItems.__call__`.
            StoreError: the store cannot be reached, and its hidden items are not known yet.
        """
        rows: list[SimilarItem] = []
        if request[ITEM][0] != PROBE.encode():  # the watch's probe asks whether this process answers
            rows = self.items.current()(request[ITEM][0], int(request[TOP_K][0]) if TOP_K in request else None)
        ids = np.empty(len(rows), dtype=object)
        ids[:] = [row.item for row in rows]
        return {
            ITEM_ID: ids,
            SCORE: [row.score for row in rows],
            TRANSITIONS: [row.transitions for row in rows],
            TITLES: [row.titles for row in rows],
        }

    def facts(self, request: Tensors, answer: Answer, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the item, and the number of similar ones."""
        return {"item": request[ITEM][0].decode(errors="replace"), "similar": len(np.asarray(answer[ITEM_ID]))}
