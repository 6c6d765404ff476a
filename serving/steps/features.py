"""The `features` step: raw ids to item numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamarec_client.contract import (
    CANDIDATE_TITLE,
    CANDIDATES,
    EXCLUDE,
    HISTORY,
    HISTORY_TITLE,
    POLICY,
    TOP_K,
    USER_ID,
    TensorSpec,
)
from preprocessing.catalogue import ITEMS_FILE, Catalogue
from preprocessing.features import FeatureEncoder
from serving.contract import (
    EXCLUDED_ITEM,
    GIVEN_ID,
    GIVEN_ITEM,
    GIVEN_TEXT,
    HISTORY_ITEM,
    HISTORY_TEXT,
    LIMIT,
    RETRIEVE,
    RULES,
    USER,
)
from serving.histories import requested_history
from serving.live_items import LiveItems, open_items
from serving.policy import NO_POLICY, Policy, encode_rules, load_policy, rules_of
from serving.steps.step import Answer, Tensors
from stores.store import Store


@dataclass(frozen=True)
class FeaturesStep:
    """Encodes a request's ids as item numbers, and checks all of the contract's limits."""

    items: LiveItems[FeatureEncoder]
    store: Store | None = None
    """Histories of users, for requests without one."""
    policy: Policy = NO_POLICY
    """Policy of the release, for requests without one."""

    @classmethod
    def load(cls, folder: Path, store: str | None = None) -> "FeaturesStep":
        """Open ``items.parquet``, ``vocabulary.json`` and, if the release has one, ``policy.json``.

        Args:
            folder: what `llamarec export` wrote.
            store: address of the store of histories and items, which is opened when it is first needed.

        Raises:
            InputError: the address is not one of a store.
        """
        encoder = FeatureEncoder.load(folder, Catalogue.load(folder / ITEMS_FILE))
        return cls.of(encoder, open_items(folder, store), load_policy(folder))

    @classmethod
    def of(cls, encoder: FeatureEncoder, store: Store | None = None, policy: Policy = NO_POLICY) -> "FeaturesStep":
        """Return the step of an encoder, of a store of histories and items, and of a release's policy."""
        return cls(LiveItems(encoder, lambda now: encoder.with_items(now.added, now.hidden), store), store, policy)

    def answer(self, request: Tensors) -> Answer:
        """Return the item numbers of a request, and as HISTORY the raw ids that they were made from.

        Hidden items are among the excluded ones. An answer about candidates without ids is nobody's: the log of answers
        would take their places for ids.

        Raises:
            InputError: the request exceeds a limit, names an unknown candidate, has an invalid policy, or neither a
                history nor a known user.
            StoreError: the store cannot be reached, and the history is in it or its hidden items are not known yet.
        """
        encoder = self.items.current()
        history = requested_history(
            _listed(request, HISTORY),
            request[USER_ID][0] if USER_ID in request else None,
            self.store,
            titled=HISTORY_TITLE in request,
        )
        candidates, titles = _listed(request, CANDIDATES), _listed(request, CANDIDATE_TITLE)
        encoded = encoder.encode(
            history,
            _listed(request, EXCLUDE) or [],
            candidates,
            int(request[TOP_K][0]) if TOP_K in request else None,
            _listed(request, HISTORY_TITLE),
            titles,
        )
        rules = rules_of(request[POLICY][0] if POLICY in request else None, self.policy, encoder, history, encoded)
        return {
            HISTORY: history,
            HISTORY_ITEM: encoded.history,
            EXCLUDED_ITEM: encoded.excluded,
            GIVEN_ITEM: encoded.given,
            RETRIEVE: [encoded.retrieve],
            LIMIT: [encoded.limit],
            USER: request.get(USER_ID, []) if candidates or not titles else [],
            GIVEN_ID: encoded.given_ids,
            GIVEN_TEXT: [text.encode() for text in encoded.given_texts],
            HISTORY_TEXT: [text.encode() for text in encoded.history_texts],
            RULES: encode_rules(rules),
        }

    def facts(self, request: Tensors, answer: Answer, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the user, the length of the history and the number of entries in it that are skipped."""
        user = request[USER_ID][0].decode(errors="replace") if USER_ID in request else None
        history: Any = answer[HISTORY]
        length = max(len(history), len(request.get(HISTORY_TITLE, ())))
        read = max(len(np.asarray(answer[spec])) for spec in (HISTORY_ITEM, HISTORY_TEXT))
        return {"user": user, "history": length, "unknown_items": length - read}


def _listed(request: Tensors, spec: TensorSpec) -> list[bytes] | None:
    """Return the strings of an optional tensor; None if it is absent."""
    return request[spec].tolist() if spec in request else None
