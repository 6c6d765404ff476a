"""The queue of ranker trainings whose results are published in docs/results/ranker.md, with their settings."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.datasets import SOURCES
from experiments.kept import scores_path
from models.ranker.options import PRESETS, RankerTraining

SHORT = {"validate_every": 200, "patience": 8}
ML = {"dropout": 0.5, "weight_decay": 0.0, "max_length": 200, "batch_size": 16, **SHORT}
RETRIEVERS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "ml-latest-small": {"lrurec": ML, "stage": {**ML, "signals": True}},
    "amazon-2014-beauty": {
        "lrurec": {"dropout": 0.5, **SHORT},
        "sasrec": {"model": "sasrec", "dropout": 0.6, "batch_size": 512, **SHORT},
        "stage": {"dropout": 0.5, "titles": "words", "untrained": False, "signals": True, **SHORT},
    },
}
"""What differs from the defaults of :class:`RetrieverTraining`: the settings that docs/results/retrievers.md chose.

``stage`` is the whole retrieval stage: LRURec, on Beauty with titles, whose candidates the signals reorder.
"""
PRESET: Mapping[str, Any] = {
    **PRESETS["smollm2-135m"],
    "validation_users": 300,
    "validate_every": 750,
    "full_validation": False,
}
"""The preset, validated less often; the kept scores of every run make a fuller validation."""
FEWER = {"max_prompts": 2400, "warmup_steps": 30}
ALL_PROMPTS = {
    "max_prompts": None,
    "max_user_prompts": None,
    "batch_size": 16,
    "micro_batch_size": 16,
    "validate_every": 1000,
}
LISTS = {**FEWER, "negatives": "retriever", "order": "retriever"}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "main": {},
    "fewer-prompts": FEWER,
    "large-steps": {**FEWER, "learning_rate": 1e-3},
    "popular": {"negatives": "popular"},
    "lists-only": LISTS,
    "lists-shuffled": {**LISTS, "order": "shuffled"},
    "lists-behind": {**LISTS, "random_prompts": 1600, "max_prompts": 800},
    "pool": {**FEWER, "negatives": "pool"},
    "pool-behind": {**FEWER, "negatives": "pool", "random_prompts": 1600, "max_prompts": 800},
    "letters": {**FEWER, "read": "letters", "depth": None, "layers": 12},
    "deep": {**FEWER, "depth": 24, "layers": 12},
    "fifty-candidates": {"candidates": 50},
    "all-prompts": ALL_PROMPTS,
    "all-prompts-letters": {**ALL_PROMPTS, "read": "letters", "depth": None, "validate_by": "alone"},
}
"""What differs from the preset ``smollm2-135m``; ``main`` is the chosen configuration."""


@dataclass(frozen=True)
class Run:
    """One training and the ways in which its ranker scores the candidates."""

    dataset: str
    retriever: str = "lrurec"
    variant: str = "main"
    seed: int = 42
    ways: tuple[str, ...] = ("tuned",)
    """``tuned``: as served; ``permuted``: with titles permuted over the catalogue; ``orders``: averaged over four
    orders of the candidates; ``untuned``: the letters of the untuned base."""
    hours: float = 1.0
    """Time limit, after which the run is stopped; the next call resumes it."""
    device: str = "cpu"
    """Device of training and scoring. Runs on a GPU are trained by :mod:`experiments.all_prompts`, not by the queue."""

    @property
    def name(self) -> str:
        """The start of the names of its files."""
        return f"{self.dataset}-{self.retriever}-{self.variant}-seed{self.seed}"

    def options(self) -> RankerTraining:
        """Return the options of the training."""
        return RankerTraining(**{**PRESET, **VARIANTS[self.variant], "seed": self.seed, "device": self.device})

    def trained(self) -> "Run":
        """Return the run whose training gives the ranker of this one.

        Random negatives do not depend on the retriever, so LRURec's ranker serves any other retriever. Lines are
        scored one by one, so the main ranker scores any number of candidates.
        """
        if self.variant == "fifty-candidates":
            return replace(self, variant="main")
        own_lists = self.options().negatives in ("retriever", "pool")
        return self if own_lists else replace(self, retriever="lrurec")

    def files(self) -> dict[str, Path]:
        """Return where the scores of each way are kept."""
        return {way: scores_path(self.name, way) for way in self.ways}


MAIN_WAYS = ("tuned", "permuted")
EVERY_WAY = (*MAIN_WAYS, "untuned", "orders")
RUNS = [
    *(
        Run(dataset, seed=seed, ways=EVERY_WAY if seed == 42 else ("tuned",), hours=6)
        for dataset in ("amazon-2014-beauty", "ml-latest-small")
        for seed in (42, 43, 44)
    ),
    *(
        Run("amazon-2014-beauty", variant="large-steps", seed=seed, ways=MAIN_WAYS if seed == 42 else ("tuned",))
        for seed in (42, 43, 44)
    ),
    Run("amazon-2014-beauty", variant="fewer-prompts", seed=44),
    *(Run("amazon-2014-beauty", retriever="sasrec", seed=seed, hours=6) for seed in (42, 43, 44)),
    *(Run(dataset, variant="popular", ways=MAIN_WAYS, hours=6) for dataset in SOURCES),
    *(
        Run(dataset, variant=name)
        for name in ("fifty-candidates", "lists-only", "lists-shuffled", "lists-behind", "letters", "deep")
        for dataset in SOURCES
    ),
    *(Run(dataset, retriever="stage", seed=seed, hours=6) for dataset in SOURCES for seed in (42, 43, 44)),
    *(
        Run(dataset, retriever="stage", variant=name, hours=2)
        for name in ("pool", "pool-behind")
        for dataset in SOURCES
    ),
    *(
        Run(dataset, variant=name, device="gpu")
        for name in ("all-prompts", "all-prompts-letters")
        for dataset in SOURCES
    ),
]
"""In the order of training: the main rows, earlier settings of them, the best retriever where that is not LRURec,
one-seed ablations with a limit of an hour, the main rows and further negatives behind the whole retrieval stage, and
all training prompts on a GPU."""


def runs_of(dataset: str, retriever: str, variant: str) -> list[Run]:
    """Return the runs of one configuration, one for each seed."""
    return [run for run in RUNS if (run.dataset, run.retriever, run.variant) == (dataset, retriever, variant)]
