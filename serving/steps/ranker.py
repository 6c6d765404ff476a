"""The `ranker` step: a prompt to the order of its candidates."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from llamarec_client.contract import ITEM_ID, RETRIEVER_RANK, SCORE
from models.ranker.inference.ranker import Ranker, Ranking, read_runtime
from models.ranker.prompt import Prompt
from serving.contract import (
    CANDIDATE_BOOST,
    CANDIDATE_ID,
    CANDIDATE_RANK,
    CANDIDATE_SCORE,
    LIMIT,
    LINE_END,
    PREFIX,
    TOKEN,
)
from serving.steps.step import Answer, JointStep, Step, Tensors, cut

Key = tuple[bytes, bytes, bytes, bytes, bytes, bytes]
"""Bytes of a request's tokens, line ends, scores, ranks, prefix and boosts, which determine its answer."""


class RankerStep:
    """Ranks the candidates of a prompt.

    Args:
        ranker: the merged model with its verbalizer and fusion weight.
        cached: number of prompts whose answers are kept, those used last. Prompt, scores and ranks determine an answer.
    """

    def __init__(self, ranker: Ranker, cached: int = 0) -> None:
        self._ranker = ranker
        self._rank = lru_cache(maxsize=cached)(self._rank_encoded)

    @classmethod
    def load(cls, folder: Path, cached: int = 0, device: str | None = None, prefix_cache: int = 0) -> Step | JointStep:
        """Return a step with the merged model with its verbalizer, fusion weight, runtime and probe prompts.

        If the ranker packs several prompts into a pass, it is a :class:`JointRankerStep`.

        Args:
            folder: what `llamarec export` wrote.
            cached: see :class:`RankerStep`.
            device: PyTorch's name of the device; by default the one in the folder's runtime.
            prefix_cache: see :meth:`models.ranker.inference.ranker.Ranker.load`.

        Raises:
            InputError: a file is missing, the model does not reproduce the scores of its probe prompts, or the cache of
                prefixes is too small.
        """
        runtime = read_runtime(folder)
        runtime = replace(runtime, device=device) if device else runtime
        ranker = Ranker.load(folder, runtime, prefix_cache)
        return JointRankerStep(ranker, cached) if ranker.packs else cls(ranker, cached)

    def answer(self, request: Tensors) -> Answer:
        """Return the candidates, best first, cut to LIMIT."""
        return _answer(request, self._rank(_key(request)))

    def facts(self, request: Tensors, answer: Answer, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return nothing: the prompt's length is counted by the step before."""
        return {}

    def _rank_encoded(self, key: Key) -> Ranking:
        """Rank with the tensors' bytes, which can be the key of a cache."""
        return self._ranker.rank(*_decoded(key))


class JointRankerStep:
    """Ranks the prompts of all requests that Triton hands over together, which share passes.

    Args:
        ranker: a ranker that packs.
        cached: see :class:`RankerStep`.
    """

    def __init__(self, ranker: Ranker, cached: int = 0) -> None:
        self._ranker = ranker
        self._limit = cached
        self._kept: OrderedDict[Key, Ranking] = OrderedDict()

    def answer_all(self, requests: Sequence[Tensors]) -> list[Answer | Exception]:
        """Return for each request the candidates, best first, cut to LIMIT, or the error that refuses it."""
        keys = [_key(request) for request in requests]
        new = [key for key in dict.fromkeys(keys) if key not in self._kept]
        found = dict(zip(new, self._ranker.rank_all([_decoded(key) for key in new]), strict=True))
        for key in keys:
            if key in self._kept:
                found[key] = self._kept[key]
                self._kept.move_to_end(key)
        self._keep(found)
        return [
            ranking if isinstance(ranking := found[key], Exception) else _answer(request, ranking)
            for key, request in zip(keys, requests, strict=True)
        ]

    def facts(self, request: Tensors, answer: Answer, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return nothing: the prompt's length is counted by the step before."""
        return {}

    def _keep(self, found: Mapping[Key, Ranking | Exception]) -> None:
        if not self._limit:
            return
        self._kept |= {key: ranking for key, ranking in found.items() if not isinstance(ranking, Exception)}
        while len(self._kept) > self._limit:
            self._kept.popitem(last=False)


def _key(request: Tensors) -> Key:
    tokens, ends, scores, ranks = (
        request[spec].tobytes() for spec in (TOKEN, LINE_END, CANDIDATE_SCORE, CANDIDATE_RANK)
    )
    prefix, boosts = (request[spec].tobytes() if spec in request else b"" for spec in (PREFIX, CANDIDATE_BOOST))
    return tokens, ends, scores, ranks, prefix, boosts


def _decoded(key: Key) -> tuple[Any, ...]:
    """Return the arguments of :meth:`Ranker.rank`."""
    tokens, line_ends, scores, ranks, prefix, boosts = key
    ids, ends, lengths = (np.frombuffer(part, np.int32).tolist() for part in (tokens, line_ends, prefix))
    numbers = np.frombuffer(scores, np.float32), np.frombuffer(ranks, np.int32)
    prompt = Prompt(ids, ends, *lengths)
    return (prompt, *numbers, np.frombuffer(boosts, np.float32)) if boosts else (prompt, *numbers)


def _answer(request: Tensors, ranking: Ranking) -> Answer:
    order, probabilities = ranking
    ranks = request[CANDIDATE_RANK]
    ids, scores, ranks = cut(request[LIMIT], request[CANDIDATE_ID][order], probabilities, ranks[order])
    return {ITEM_ID: ids, SCORE: scores, RETRIEVER_RANK: ranks}
