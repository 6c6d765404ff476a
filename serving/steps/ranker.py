"""The `ranker` step: a prompt to the order of its candidates."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamarec_client.contract import ITEM_ID, RETRIEVER_RANK, SCORE
from models.ranker.inference.ranker import Ranker, read_runtime
from models.ranker.prompt import Prompt
from serving.contract import CANDIDATE_ID, CANDIDATE_RANK, CANDIDATE_SCORE, LIMIT, LINE_END, PREFIX, TOKEN
from serving.steps.step import Answer, Tensors, cut


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
    def load(cls, folder: Path, cached: int = 0, device: str | None = None, prefix_cache: int = 0) -> "RankerStep":
        """Open the merged model with its verbalizer, fusion weight, runtime and probe prompts.

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
        return cls(Ranker.load(folder, runtime, prefix_cache), cached)

    def answer(self, request: Tensors) -> Answer:
        """Return the candidates, best first, cut to LIMIT."""
        given = (request[spec].tobytes() for spec in (TOKEN, LINE_END, CANDIDATE_SCORE, CANDIDATE_RANK))
        prefix = request[PREFIX].tobytes() if PREFIX in request else b""
        order, probabilities = self._rank(*given, prefix)
        ranks = request[CANDIDATE_RANK]
        ids, scores, ranks = cut(request[LIMIT], request[CANDIDATE_ID][order], probabilities, ranks[order])
        return {ITEM_ID: ids, SCORE: scores, RETRIEVER_RANK: ranks}

    def facts(self, request: Tensors, answer: Answer, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return nothing: the prompt's length is counted by the step before."""
        return {}

    def _rank_encoded(
        self, tokens: bytes, line_ends: bytes, scores: bytes, ranks: bytes, prefix: bytes
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Rank with the tensors' bytes, which can be the key of a cache."""
        ids, ends, lengths = (np.frombuffer(part, np.int32).tolist() for part in (tokens, line_ends, prefix))
        prompt = Prompt(ids, ends, *lengths)
        return self._ranker.rank(prompt, np.frombuffer(scores, np.float32), np.frombuffer(ranks, np.int32))
