"""The `features` step: raw ids to item numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamarec_client.contract import CANDIDATES, EXCLUDE, HISTORY, TOP_K, USER_ID
from preprocessing.catalogue import ITEMS_FILE, Catalogue
from preprocessing.features import FeatureEncoder
from serving.contract import EXCLUDED_ITEM, GIVEN_ITEM, HISTORY_ITEM, LIMIT, RETRIEVE
from serving.steps.step import Answer, Tensors


@dataclass(frozen=True)
class FeaturesStep:
    """Encodes a request's ids as item numbers, and checks all of the contract's limits."""

    encoder: FeatureEncoder

    @classmethod
    def load(cls, folder: Path) -> "FeaturesStep":
        """Open ``items.parquet`` and ``vocabulary.json``."""
        return cls(FeatureEncoder.load(folder, Catalogue.load(folder / ITEMS_FILE)))

    def answer(self, request: Tensors) -> Answer:
        """Return the item numbers of a request.

        Raises:
            InputError: the request exceeds a limit or names an unknown candidate.
        """
        encoded = self.encoder.encode(
            request[HISTORY].tolist(),
            request[EXCLUDE].tolist() if EXCLUDE in request else [],
            request[CANDIDATES].tolist() if CANDIDATES in request else None,
            int(request[TOP_K][0]) if TOP_K in request else None,
        )
        return {
            HISTORY_ITEM: encoded.history,
            EXCLUDED_ITEM: encoded.excluded,
            GIVEN_ITEM: encoded.given,
            RETRIEVE: [encoded.retrieve],
            LIMIT: [encoded.limit],
        }

    def facts(self, request: Tensors, answer: Answer, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the user, the length of the history and the number of unknown items in it."""
        user = request[USER_ID][0].decode(errors="replace") if USER_ID in request else None
        known = len(np.asarray(answer[HISTORY_ITEM]))
        return {"user": user, "history": len(request[HISTORY]), "unknown_items": len(request[HISTORY]) - known}
