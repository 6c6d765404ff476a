"""Runs the exported steps one after another in this process: the reference for the server's answers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.ranker.inference.ranker import Ranker
from models.ranker.prompt import Prompt, PromptBuilder, listed
from models.retriever.candidates import Candidates
from models.retriever.inference.onnx_retriever import OnnxRetriever
from models.retriever.rules import Rules
from preprocessing.catalogue import ITEMS_FILE, Catalogue
from preprocessing.features import EncodedRequest, FeatureEncoder
from serving.histories import requested_history
from serving.layout import step_artifact
from serving.policy import NO_POLICY, Policy, given_candidates, load_policy, retrieved, rules_of
from stores.store import Listing, Store

Row = tuple[str, float, int]
"""Raw id, score and retriever rank of an item in an answer."""


@dataclass(frozen=True)
class RetrievalSteps:
    """The objects that the first two Triton steps hold, loaded from the same files."""

    catalogue: Catalogue
    features: FeatureEncoder
    retriever: OnnxRetriever
    policy: Policy = NO_POLICY
    """Policy of the release."""

    @classmethod
    def load(cls, repository: Path, suffix: str = "") -> "RetrievalSteps":
        """Open the files of an export as :meth:`ExportedSteps.load` does, without those of the ranker."""
        features = step_artifact(repository, "features", suffix)
        catalogue = Catalogue.load(features / ITEMS_FILE)
        encoder = FeatureEncoder.load(features, catalogue)
        retriever = OnnxRetriever.load(step_artifact(repository, "retriever", suffix))
        return cls(catalogue, encoder, retriever, load_policy(features))

    def with_items(self, listing: Listing) -> "RetrievalSteps":
        """Return the steps with the items that are added and hidden while a server runs."""
        catalogue = self.catalogue.with_added(listing.added)
        return RetrievalSteps(
            catalogue,
            self.features.with_items(listing.added, listing.hidden),
            self.retriever.with_added(catalogue.titles_after(len(self.catalogue))),
            self.policy,
        )

    def recommend(
        self, history: Sequence[str], top_k: int | None = None, policy: Mapping[str, Any] | None = None
    ) -> list[Row]:
        """Return the answer of the ensemble ``llamarec_retrieval``, best first.

        One history runs at a time, as in the server. Runs of several histories give scores with other last bits.

        Raises:
            InputError: the server refuses this request too.
        """
        raw_history = [raw.encode() for raw in history]
        request = self.features.encode(raw_history, top_k=top_k)
        rules = rules_of(_encoded_policy(policy), self.policy, self.features, raw_history, request)
        found = retrieved(self.retriever, self.catalogue, rules, request.history, request.excluded)
        answer = zip(found.items, found.probabilities(), found.ranks, strict=True)
        rows = [(self.catalogue.raw(int(item)).decode(), float(score), int(rank)) for item, score, rank in answer]
        return rows[: request.limit or None]


@dataclass(frozen=True)
class ExportedSteps:
    """The objects that the four Triton steps hold, loaded from the same files."""

    catalogue: Catalogue
    features: FeatureEncoder
    retriever: OnnxRetriever
    prompts: PromptBuilder
    ranker: Ranker
    store: Store | None = None
    """Histories of users, for requests without one."""
    policy: Policy = NO_POLICY
    """Policy of the release."""

    @classmethod
    def load(cls, repository: Path, suffix: str = "", store: Store | None = None) -> "ExportedSteps":
        """Open the files that `llamarec export` wrote; with ``suffix``, those of a release.

        Raises:
            InputError: nothing was exported, or the ranker fails its probes.
        """
        retrieval = RetrievalSteps.load(repository, suffix)
        return cls(
            retrieval.catalogue,
            retrieval.features,
            retrieval.retriever,
            PromptBuilder.load(step_artifact(repository, "prompt_builder", suffix)),
            Ranker.load(step_artifact(repository, "ranker", suffix)),
            store,
            retrieval.policy,
        )

    def with_items(self, listing: Listing) -> "ExportedSteps":
        """Return the steps with the items that are added and hidden while a server runs."""
        retrieval = RetrievalSteps(self.catalogue, self.features, self.retriever).with_items(listing)
        return replace(
            self,
            catalogue=retrieval.catalogue,
            features=retrieval.features,
            retriever=retrieval.retriever,
            prompts=self.prompts.with_added(listing.added),
        )

    def rules(
        self, history: Sequence[bytes], request: EncodedRequest, policy: Mapping[str, Any] | None = None
    ) -> Rules | None:
        """Return the rules of a request's policy and of the release's; None if there is neither.

        Raises:
            InputError: the server refuses the policy too.
        """
        return rules_of(_encoded_policy(policy), self.policy, self.features, history, request)

    def candidates(self, request: EncodedRequest, rules: Rules | None = None) -> Candidates:
        """Return the candidates that the first two steps pass to the last two."""
        if request.retrieve:
            return retrieved(self.retriever, self.catalogue, rules, request.history, request.excluded)
        given = given_candidates(self.retriever, rules, request.history, request.given)
        return given.comparable() if len(request.given_texts) else given

    def logits(self, history: Sequence[int] | NDArray[np.int32], candidates: Candidates) -> NDArray[np.float32]:
        """Return the ranker's logits of the candidates, shape [k]."""
        return self.ranker.logits(self.prompts.build(history, candidates.items))

    def recommend(
        self,
        history: Sequence[str] | None = None,
        *,
        user_id: str | None = None,
        exclude: Sequence[str] = (),
        candidates: Sequence[str] | None = None,
        top_k: int | None = None,
        history_titles: Sequence[str] | None = None,
        candidate_titles: Sequence[str] | None = None,
        policy: Mapping[str, Any] | None = None,
    ) -> list[Row]:
        """Return the answer of the ensemble: raw id, score and retriever rank of each item, best first.

        Raises:
            InputError: the server refuses this request too.
            StoreError: the history is in the store, and the store cannot be reached.
        """
        user = None if user_id is None else user_id.encode()
        found_history = requested_history(_encoded(history), user, self.store, titled=history_titles is not None)
        request = self.features.encode(
            found_history,
            [raw.encode() for raw in exclude],
            _encoded(candidates),
            top_k,
            _encoded(history_titles),
            _encoded(candidate_titles),
        )
        found = self.candidates(request, self.rules(found_history, request, policy))
        if not len(found.items):
            return []
        prompt = self._prompt(request, found.items)
        places, probabilities = self.ranker.rank(prompt, found.scores, found.ranks, found.boosts)
        answer = zip(found.items[places], probabilities, found.ranks[places], strict=True)
        return [
            (self._raw(request, int(item)).decode(), float(probability), int(rank))
            for item, probability, rank in answer
        ][: request.limit or None]

    def _prompt(self, request: EncodedRequest, candidates: NDArray[np.int32]) -> Prompt:
        """Return the prompt of candidates, which are in the order of the retrieval stage."""
        texts = dict(zip(request.given.tolist(), request.given_texts, strict=False))  # fewer if there are none at all
        items = candidates.tolist()
        return self.prompts.build(
            request.history_texts or request.history, listed(items, [texts[item] for item in items] if texts else [])
        )

    def _raw(self, request: EncodedRequest, item: int) -> bytes:
        """Return the raw id of a candidate."""
        if item > 0:
            return self.catalogue.raw(item)
        place: int = request.given.tolist().index(item)
        return request.given_ids[place]


def _encoded_policy(policy: Mapping[str, Any] | None) -> bytes | None:
    return None if policy is None else json.dumps(policy).encode()


def _encoded(texts: Sequence[str] | None) -> list[bytes] | None:
    return None if texts is None else [text.encode() for text in texts]
