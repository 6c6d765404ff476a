"""The ranker as it is served and as offline evaluation measures it: prompt and candidates in, order out."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from models.ranker.fusion import fuse, log_softmax, order
from models.ranker.scoring import Runtime, Scorer, load_scorer
from preprocessing.errors import InputError

MODEL_FOLDER = "merged"
LETTERS_FILE = "letters.json"
FUSION_FILE = "fusion.json"
PROBES_FILE = "probes.json"
RUNTIME_FILE = "runtime.json"
EXPORTED_FILES = (LETTERS_FILE, FUSION_FILE, PROBES_FILE)

PROBE_TOLERANCE = {"float32": 1e-2, "float16": 0.1, "bfloat16": 1.0}
"""Change of a prompt's log-probabilities (root mean square over the letters) that the precision explains. Measured on
tuned models: 5e-7 on the same processor in fp32, 3e-5 from PyTorch to OpenVINO; in bf16 0.04 and, where a model that is
very sure of itself wavers, 0.7 in PyTorch and OpenVINO alike, one letter moving by 1.7."""


def write_runtime(folder: Path, runtime: Runtime) -> None:
    """Records in an exported folder how its ranker is to be run."""
    (folder / RUNTIME_FILE).write_text(json.dumps(asdict(runtime), indent=1) + "\n", encoding="utf-8")


class Ranker:
    """Orders the candidates of one prompt after another."""

    def __init__(
        self, scorer: Scorer, letter_ids: Sequence[int], weight: float, runtime: Runtime, temperature: float = 1.0
    ) -> None:
        """Args:
        scorer: gives the letters' logits.
        letter_ids: token id of each letter.
        weight: of the retriever, see :func:`models.ranker.fusion.fuse`.
        runtime: how the scorer runs.
        temperature: of the probabilities; the order does not depend on it.

        Raises:
            InputError: the weight is not from 0 to 1, or the temperature not above 0.
        """
        if not (0 <= weight <= 1 and temperature > 0):
            raise InputError(
                f"the retriever's weight must be 0 to 1, not {weight}, and the temperature above 0, not {temperature}:"
                " run `llamarec train-ranker` again"
            )
        self._scorer = scorer
        self._letter_ids = letter_ids
        self._temperature = temperature
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
        letter_ids, fusion = list(_read(folder / LETTERS_FILE).values()), _read(folder / FUSION_FILE)
        scorer = load_scorer(folder / MODEL_FOLDER, runtime)
        ranker = cls(scorer, letter_ids, fusion["weight"], runtime, fusion.get("temperature", 1.0))
        tolerance = PROBE_TOLERANCE[runtime.dtype]
        for place, probe in enumerate(_read(folder / PROBES_FILE)):
            expected = np.asarray(probe["logprobs"])
            found = log_softmax(ranker.letter_logits(probe["tokens"], len(expected)))
            change = np.sqrt(np.mean((found - expected) ** 2))
            if not change <= tolerance:
                raise InputError(
                    f"{folder} is not served: probe prompt {place} moved by {change:.3g} in log-probability"
                    f" ({tolerance} is what {runtime.runtime} in {runtime.dtype} explains): run `llamarec export` again"
                )
        return ranker

    def letter_logits(self, token_ids: Sequence[int], k: int) -> NDArray[np.float32]:
        """Logits of the first ``k`` letters [k] behind a prompt."""
        logits: NDArray[np.float32] = self._scorer.score([token_ids], self._letter_ids[:k])[0]
        return logits

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
        probabilities = np.exp(log_softmax(logprobs / self._temperature))
        return places, probabilities[places].astype(np.float32)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: run `llamarec export`") from None
