"""Orders candidates with a merged model; serving and offline evaluation both rank through this module."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from models.ranker.fusion import boosted, fuse, log_softmax, order
from models.ranker.inference.prefixes import PrefixCache
from models.ranker.inference.runtimes import load_scorer
from models.ranker.inference.scorer import Runtime, Scorer, SlabScorer
from models.ranker.inference.verbalizer import VERBALIZER_FILE, Verbalizer, restore_verbalizer
from models.ranker.prompt import Prompt
from preprocessing.errors import InputError

MODEL_FOLDER = "merged"
FUSION_FILE = "fusion.json"
PROBES_FILE = "probes.json"
RUNTIME_FILE = "runtime.json"
EXPORTED_FILES = (VERBALIZER_FILE, FUSION_FILE, PROBES_FILE)

PROBE_TOLERANCE = {"float32": 1e-2, "float16": 0.1, "bfloat16": 1.0}
"""Largest change of a prompt's log-probabilities (root mean square over the candidates) that the precision explains.
Measured on tuned models: in fp32 5e-7 on the same processor and 3e-5 between PyTorch and OpenVINO; in bf16 0.04, and
for a model with very peaked distributions 0.7 in both PyTorch and OpenVINO, where one letter changed by 1.7."""
FLOAT8_SHARE = 0.5
"""Largest such change in fp8, as a share of the standard deviation of the candidates' log-probabilities. Rounding to
fp8 changes what the model says, and beyond this the order would be more of rounding than of the model."""


def write_runtime(folder: Path, runtime: Runtime) -> None:
    """Write the runtime of an exported ranker into its folder."""
    (folder / RUNTIME_FILE).write_text(json.dumps(asdict(runtime), indent=1) + "\n", encoding="utf-8")


def read_runtime(folder: Path) -> Runtime:
    """Return the runtime that :func:`write_runtime` wrote.

    Raises:
        InputError: the file is missing, or the runtime is not one of this version.
    """
    return Runtime(**_read(folder / RUNTIME_FILE))


Ranking = tuple[NDArray[np.int64], NDArray[np.float32]]
"""Indices of the candidates, best first [k], and their probabilities in that order [k]."""

Given = tuple[Prompt, ArrayLike, ArrayLike] | tuple[Prompt, ArrayLike, ArrayLike, NDArray[np.float32] | None]
"""Arguments of :meth:`Ranker.rank`."""


class Ranker:
    """A merged model with everything that turns its logits into a ranking.

    Args:
        scorer: the language model.
        verbalizer: reads the candidates' logits from the scorer.
        weight: weight of the retriever; see :func:`models.ranker.fusion.fuse`.
        runtime: runtime of the scorer.
        temperature: temperature of the probabilities; the order does not depend on it.

    Raises:
        InputError: the weight is not between 0 and 1, or the temperature is not above 0.
    """

    def __init__(
        self, scorer: Scorer, verbalizer: Verbalizer, weight: float, runtime: Runtime, temperature: float = 1.0
    ) -> None:
        if not (0 <= weight <= 1 and temperature > 0):
            raise InputError(
                f"the retriever's weight must be 0 to 1 and the temperature above 0, not {weight} and {temperature}:"
                " run `llamarec train-ranker` again"
            )
        self._scorer = scorer
        self._verbalizer = verbalizer
        self.temperature = temperature
        self.weight = weight
        self.runtime = runtime

    @classmethod
    def load(cls, folder: Path, runtime: Runtime | None = None, prefix_cache: int = 0) -> "Ranker":
        """Return the ranker of a folder that holds ``merged/`` and ``{verbalizer,fusion,probes,runtime}.json``.

        Args:
            folder: a folder that `llamarec export` wrote.
            runtime: replaces the runtime stored in the folder; evaluation uses it to compare with fp32.
            prefix_cache: memory in MB for the keys and values of the prefixes used last; 0 keeps none.

        Raises:
            InputError: a file is missing, the model does not reproduce the scores stored with the probes, or the cache
                would not hold one prefix.
        """
        runtime = runtime or read_runtime(folder)
        verbalizer, fusion = restore_verbalizer(_read(folder / VERBALIZER_FILE)), _read(folder / FUSION_FILE)
        probes = read_probes(folder)
        given = runtime
        if prefix_cache and runtime.runtime == "torch" and runtime.forward != "transformers":
            # The packed forward keeps no prefixes.
            given = replace(runtime, forward="transformers")
            if runtime.forward == "packed" or runtime.device != "cpu":
                logging.getLogger(__name__).warning(
                    "the ranker runs one prompt at a time in transformers' layers: --prefix-cache keeps histories,"
                    " which the packed forward does not"
                )
        scorer = load_scorer(folder / MODEL_FOLDER, given)
        scorer.settle([probe.prompt for probe in probes])
        ranker = cls(scorer, verbalizer, fusion["weight"], runtime, fusion.get("temperature", 1.0))
        if prefix_cache:
            check_prefix_cache(prefix_cache, ranker.prefix_bytes([probe.prompt for probe in probes]))
            assert isinstance(scorer, SlabScorer)
            scorer.prefixes = PrefixCache(prefix_cache << 20)
        for place, (prompt, expected) in enumerate(probes):
            found = log_softmax(ranker.logits(prompt))
            change = np.sqrt(np.mean((found - expected) ** 2))
            float8 = runtime.dtype == "float8"
            tolerance = FLOAT8_SHARE * float(np.std(expected)) if float8 else PROBE_TOLERANCE[runtime.dtype]
            if not change <= tolerance:
                raise InputError(
                    f"{folder} is not served: probe prompt {place} moved by {change:.3g} in log-probability, more than"
                    f" the {tolerance:.3g} allowed for {runtime.runtime} in {runtime.dtype}: run `llamarec export`"
                    f" {'with --dtype float16' if float8 else 'again'}"
                )
        return ranker

    def logits(self, prompt: Prompt) -> NDArray[np.float32]:
        """Return the language model's logits of a prompt's candidates [k]."""
        return self._verbalizer.logits(self._scorer, prompt)

    def prefix_bytes(self, prompts: Sequence[Prompt]) -> int:
        """Return the memory in bytes that the longest prefix of these prompts takes; 0 if they have none."""
        longest = max((prompt.tokens[: prompt.prefix] for prompt in prompts), key=len)
        return self._scorer.prefix_bytes(longest) if longest else 0

    @property
    def packs(self) -> bool:
        """Whether :meth:`rank_all` takes less time than ranking the prompts one by one."""
        return self._scorer.packs

    def rank(
        self, prompt: Prompt, scores: ArrayLike, ranks: ArrayLike, boosts: NDArray[np.float32] | None = None
    ) -> Ranking:
        """Return the order of a prompt's k candidates, and their probabilities.

        Args:
            prompt: the prompt, with the position at which each candidate's line ends.
            scores: the retriever's logits [k]; -inf for a candidate outside its vocabulary.
            ranks: the retriever's ranks [k], from 1; 0 for a candidate outside its vocabulary.
            boosts: see :func:`models.ranker.fusion.boosted`.

        Returns:
            the candidates' indices in the prompt, best first [k], and their probabilities in that order [k].

        Raises:
            InputError: the line ends are not k positions in the prompt.
        """
        _check(prompt, np.asarray(scores).size)
        if not prompt.line_ends:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        return self._ordered(self.logits(prompt), scores, ranks, boosts)

    def rank_all(self, given: Sequence[Given]) -> list[Ranking | Exception]:
        """Return what :meth:`rank` returns for each prompt, or the error that it raises; prompts share passes.

        If a pass fails, its prompts are ranked one by one, so that the one which makes it fail spoils no other.

        Args:
            given: the arguments of :meth:`rank`.
        """
        asked = [row for row in given if row[0].line_ends and _fits(row[0], np.asarray(row[1]).size)]
        try:
            logits = self._verbalizer.logits_of(self._scorer, [row[0] for row in asked]) if asked else []
        except Exception:
            logging.getLogger(__name__).exception("%d prompts are ranked one by one: their passes failed", len(asked))
            return [_outcome(partial(self.rank, *row)) for row in given]
        found = {id(row): values for row, values in zip(asked, logits, strict=True)}
        return [
            self._ordered(found[id(row)], *row[1:]) if id(row) in found else _outcome(partial(self.rank, *row))
            for row in given
        ]

    def _ordered(
        self,
        logits: NDArray[np.float32],
        scores: ArrayLike,
        ranks: ArrayLike,
        boosts: NDArray[np.float32] | None = None,
    ) -> Ranking:
        logprobs = boosted(fuse(logits, scores, self.weight), boosts, self.temperature)
        places = order(logprobs, ranks)
        probabilities = np.exp(log_softmax(logprobs / self.temperature))
        return places, probabilities[places].astype(np.float32)


def _fits(prompt: Prompt, k: int) -> bool:
    """Return whether a prompt's line ends are k positions in it, in order if the lines are independent."""
    ends = prompt.line_ends
    in_order = not prompt.prefix or all(np.diff([prompt.prefix - 1, *ends]) > 0)
    return len(ends) == k and all(0 <= end < len(prompt.tokens) for end in ends) and bool(in_order)


def _check(prompt: Prompt, k: int) -> None:
    if not _fits(prompt, k):
        raise InputError(
            f"{len(prompt.line_ends)} line ends for {k} candidates in {len(prompt.tokens)} tokens: give one position in"
            " the prompt for each"
        )


def _outcome(run: Callable[[], Ranking]) -> Ranking | Exception:
    try:
        return run()
    except Exception as error:
        return error


class Probe(NamedTuple):
    """A prompt that every runtime replays when it loads a ranker."""

    prompt: Prompt
    logprobs: NDArray[np.float64]
    """Log-probabilities of its candidates in fp32 [k]."""


def read_probes(folder: Path) -> list[Probe]:
    """Return the probes of a ranker's folder.

    Raises:
        InputError: the file is missing.
    """
    rows = _read(folder / PROBES_FILE)
    return [
        Probe(Prompt(row["tokens"], row["line_ends"], row.get("prefix", 0)), np.asarray(row["logprobs"]))
        for row in rows
    ]


def check_prefix_cache(megabytes: int, needed: int) -> None:
    """Check that a cache holds one prefix.

    Args:
        megabytes: size of the cache.
        needed: bytes of a prefix; 0 for a ranker whose prompts have none.

    Raises:
        InputError: it does not, or there are no prefixes to keep.
    """
    if not needed:
        raise InputError(
            "a prefix cache is for rankers that read independent lines: leave out --prefix-cache, or train with"
            " `llamarec train-ranker --read independent-lines`"
        )
    if needed > megabytes << 20:
        raise InputError(
            f"a prefix cache of {megabytes} MB does not hold one user's history, which takes {-(-needed // 2**20)} MB:"
            f" give at least --prefix-cache {-(-needed // 2**20)}, or 0 for none"
        )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: run `llamarec export`") from None
