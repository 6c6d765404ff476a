"""The ranker as it is served and as offline evaluation measures it: prompt and candidates in, order out."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from models.ranker.fusion import fuse, log_softmax, order
from models.ranker.scoring import LetterScorer, Runtime
from preprocessing.errors import InputError

MODEL_FOLDER = "merged"
LETTERS_FILE = "letters.json"
FUSION_FILE = "fusion.json"
PROBES_FILE = "probes.json"
RUNTIME_FILE = "runtime.json"
EXPORTED_FILES = (LETTERS_FILE, FUSION_FILE, PROBES_FILE)

PROBE_TOLERANCE = {"float32": 1e-2, "bfloat16": 1.0}
"""Largest change of a letter's log-probability that the precision explains. Measured on tuned models: 5e-7 on the same
processor in fp32, 0.3 in bf16."""


def write_runtime(folder: Path, runtime: Runtime) -> None:
    """Records in an exported folder how its ranker is to be run."""
    (folder / RUNTIME_FILE).write_text(json.dumps(asdict(runtime), indent=1) + "\n", encoding="utf-8")


class Ranker:
    """Orders the candidates of one prompt after another."""

    def __init__(self, scorer: LetterScorer, weight: float, runtime: Runtime) -> None:
        """Args:
        scorer: gives the letters' logits.
        weight: of the retriever, see :func:`models.ranker.fusion.fuse`.
        runtime: how the scorer runs.

        Raises:
            InputError: the weight is not from 0 to 1.
        """
        if not 0 <= weight <= 1:
            raise InputError(f"the retriever's weight must be 0 to 1, not {weight}: run `llamarec train-ranker` again")
        self._scorer = scorer
        self.weight = weight
        self.runtime = runtime

    @classmethod
    def load(cls, folder: Path, runtime: Runtime | None = None) -> "Ranker":
        """The ranker of a folder with the merged model, ``{letters,fusion,probes,runtime}.json``.

        Args:
            folder: what `llamarec export` wrote.
            runtime: runs it otherwise than the folder says; evaluation does, to compare with fp32.

        Raises:
            InputError: a file is missing, or the model does not give the probes' scores that were stored with it.
        """
        runtime = runtime or Runtime(**_read(folder / RUNTIME_FILE))
        scorer = LetterScorer(folder / MODEL_FOLDER, list(_read(folder / LETTERS_FILE).values()), runtime)
        ranker = cls(scorer, _read(folder / FUSION_FILE)["weight"], runtime)
        tolerance = PROBE_TOLERANCE[runtime.dtype]
        for place, probe in enumerate(_read(folder / PROBES_FILE)):
            expected = np.asarray(probe["logprobs"])
            change = np.abs(log_softmax(ranker.letter_logits(probe["tokens"], len(expected))) - expected).max()
            if not change <= tolerance:
                raise InputError(
                    f"{folder} is not served: probe prompt {place} moved by {change:.3g} in log-probability"
                    f" ({tolerance} is what {runtime.dtype} explains): run `llamarec export` again"
                )
        return ranker

    def letter_logits(self, token_ids: Sequence[int], k: int) -> NDArray[np.float32]:
        """Logits of the first ``k`` letters [k] behind a prompt."""
        return self._scorer(token_ids)[:k]

    def rank(
        self, token_ids: Sequence[int], scores: ArrayLike, ranks: ArrayLike
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Orders the k candidates of a prompt.

        Args:
            token_ids: the prompt.
            scores: the retriever's logits [k]; -inf where it does not know a candidate.
            ranks: the retriever's places [k], from 1; 0 where it does not know a candidate.

        Returns:
            The candidates' places in the prompt, best first [k], and their probabilities in that order [k].
        """
        k = np.asarray(scores).size
        if k == 0:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        logprobs = fuse(self.letter_logits(token_ids, k), scores, self.weight)
        places = order(logprobs, ranks)
        return places, np.exp(logprobs[places]).astype(np.float32)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: run `llamarec export`") from None
