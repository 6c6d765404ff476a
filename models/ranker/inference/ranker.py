"""The ranker as it is served and as offline evaluation measures it: prompt and candidates in, order out."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from models.ranker.fusion import fuse, log_softmax, order
from models.ranker.inference.runtimes import load_scorer
from models.ranker.inference.scorer import Runtime, Scorer
from models.ranker.inference.verbalizer import VERBALIZER_FILE, Verbalizer, restore_verbalizer
from models.ranker.prompt import Prompt
from preprocessing.errors import InputError

MODEL_FOLDER = "merged"
FUSION_FILE = "fusion.json"
PROBES_FILE = "probes.json"
RUNTIME_FILE = "runtime.json"
EXPORTED_FILES = (VERBALIZER_FILE, FUSION_FILE, PROBES_FILE)

PROBE_TOLERANCE = {"float32": 1e-2, "float16": 0.1, "bfloat16": 1.0}
"""Change of a prompt's log-probabilities (root mean square over the candidates) that the precision explains. Measured
on tuned models: 5e-7 on the same processor in fp32, 3e-5 from PyTorch to OpenVINO; in bf16 0.04 and, where a model that
is very sure of itself wavers, 0.7 in PyTorch and OpenVINO alike, one letter moving by 1.7."""


def write_runtime(folder: Path, runtime: Runtime) -> None:
    """Records in an exported folder how its ranker is to be run."""
    (folder / RUNTIME_FILE).write_text(json.dumps(asdict(runtime), indent=1) + "\n", encoding="utf-8")


class Ranker:
    """Orders the candidates of one prompt after another."""

    def __init__(
        self, scorer: Scorer, verbalizer: Verbalizer, weight: float, runtime: Runtime, temperature: float = 1.0
    ) -> None:
        """Args:
        scorer: the language model.
        verbalizer: reads the candidates' logits from it.
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
        self._verbalizer = verbalizer
        self._temperature = temperature
        self.weight = weight
        self.runtime = runtime

    @classmethod
    def load(cls, folder: Path, runtime: Runtime | None = None) -> "Ranker":
        """The ranker of a folder with the merged model, ``{verbalizer,fusion,probes,runtime}.json``.

        Args:
            folder: what `llamarec export` wrote.
            runtime: runs it otherwise than the folder says; evaluation does, to compare with fp32.

        Raises:
            InputError: a file is missing, or the model does not give the probes' scores that were stored with it.
        """
        runtime = runtime or Runtime(**_read(folder / RUNTIME_FILE))
        verbalizer, fusion = restore_verbalizer(_read(folder / VERBALIZER_FILE)), _read(folder / FUSION_FILE)
        scorer = load_scorer(folder / MODEL_FOLDER, runtime)
        ranker = cls(scorer, verbalizer, fusion["weight"], runtime, fusion.get("temperature", 1.0))
        tolerance = PROBE_TOLERANCE[runtime.dtype]
        for place, probe in enumerate(_read(folder / PROBES_FILE)):
            expected = np.asarray(probe["logprobs"])
            found = log_softmax(ranker.logits(Prompt(probe["tokens"], probe["line_ends"])))
            change = np.sqrt(np.mean((found - expected) ** 2))
            if not change <= tolerance:
                raise InputError(
                    f"{folder} is not served: probe prompt {place} moved by {change:.3g} in log-probability"
                    f" ({tolerance} is what {runtime.runtime} in {runtime.dtype} explains): run `llamarec export` again"
                )
        return ranker

    def logits(self, prompt: Prompt) -> NDArray[np.float32]:
        """Of the candidates of a prompt [k]."""
        return self._verbalizer.logits(self._scorer, prompt)

    def rank(
        self, prompt: Prompt, scores: ArrayLike, ranks: ArrayLike
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Orders the k candidates of a prompt.

        Args:
            prompt: with the place of each candidate's line end.
            scores: the retriever's logits [k]; -inf where it does not know a candidate.
            ranks: the retriever's places [k], from 1; 0 where it does not know a candidate.

        Returns:
            The candidates' places in the prompt, best first [k], and their probabilities in that order [k].

        Raises:
            InputError: the line ends are not k places in the prompt.
        """
        k, tokens, ends = np.asarray(scores).size, len(prompt.tokens), prompt.line_ends
        if len(ends) != k or not all(0 <= end < tokens for end in ends):
            raise InputError(
                f"{len(ends)} line ends for {k} candidates in {tokens} tokens: give one place in the prompt for each"
            )
        if k == 0:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        logprobs = fuse(self.logits(prompt), scores, self.weight)
        places = order(logprobs, ranks)
        probabilities = np.exp(log_softmax(logprobs / self._temperature))
        return places, probabilities[places].astype(np.float32)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: run `llamarec export`") from None
