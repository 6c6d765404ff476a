"""Options of a ranker's training, and the named presets."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from llamarec_client.contract import MAX_CANDIDATES
from models.ranker.prompt import LETTERS, MOST_CANDIDATES, PromptSettings
from preprocessing.errors import InputError

Negatives = Literal["random", "popular", "retriever", "pool"]
Order = Literal["shuffled", "retriever"]
Read = Literal["letters", "lines", "independent-lines"]
Quantisation = Literal["nf4", "none"]
TrainingDtype = Literal["auto", "bfloat16", "float32"]
ValidateBy = Literal["alone", "fused"]
CHOICES = {
    "quantisation": Quantisation,
    "dtype": TrainingDtype,
    "negatives": Negatives,
    "order": Order,
    "read": Read,
    "validate_by": ValidateBy,
}
"""Options with a fixed set of values."""


@dataclass(frozen=True, kw_only=True)
class RankerTraining:
    """Options of a ranker's training. The defaults are the paper's (section 4.0.4)."""

    rank: int = 8
    """Rank of the adapters."""
    alpha: int = 32
    """Numerator of the adapters' scale, which is ``alpha / rank``."""
    dropout: float = 0.05
    """Dropout probability of an adapter's input."""
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Names of the projections that get an adapter: the base's own, or Llama's, which stand for the base's
    counterparts."""
    layers: int | None = None
    """Number of upper layers that get adapters; all layers if absent. The layers below need no backward pass."""
    quantisation: Quantisation = "nf4"
    """Quantisation of the frozen base: ``nf4`` (QLoRA) or ``none`` (plain LoRA)."""
    dtype: TrainingDtype = "auto"
    """Precision of the arithmetic: ``bfloat16``, ``float32``, or ``auto``, which is ``bfloat16`` where the hardware
    multiplies it natively and ``float32`` elsewhere."""
    learning_rate: float = 1e-4
    """AdamW step size after warm-up; it falls linearly to 0 at the end."""
    warmup_steps: int = 100
    """Number of steps of linear warm-up, limited to a tenth of all steps."""
    clip: float = 1.0
    """Maximum norm of a step's gradient; a larger gradient is scaled down to it."""
    batch_size: int = 16
    """Number of prompts in a step."""
    micro_batch_size: int = 4
    """Number of prompts computed at once. A smaller value needs less memory and gives the same result."""
    gradient_checkpointing: bool = False
    """Whether to recompute the layers in the backward pass, which needs a third of the memory and a third more time."""
    epochs: int = 1
    """Number of passes over the training prompts."""
    max_prompts: int | None = None
    """Maximum number of different prompts to train on, drawn at random; all of them if absent."""
    max_user_prompts: int | None = None
    """Maximum number of prompts for one user, so that long sequences do not dominate; no limit if absent."""
    read: Read = "letters"
    """Where the ranking is read: ``letters``, the index letters after the prompt, as in the paper; ``lines``, the ends
    of the candidates' lines, which a small base learns from a fraction of the prompts; or ``independent-lines``, the
    ends of lines that see the history but no other candidate, so that a score depends on the user and the item
    alone."""
    depth: int | None = None
    """Maximum number of the base's lower layers that are kept; all if absent. ``letters`` work well only with all of
    them."""
    random_prompts: int = 0
    """Number of prompts with random candidates to train on before those with ``negatives``. Titles of random items
    differ more than those of items that a retriever selects together."""
    negatives: Negatives = "random"
    """Source of the training candidates: ``random`` draws items uniformly, as in the paper; ``popular`` draws them in
    proportion to their frequency in the training sequences, so that popularity, which the retriever covers, does not
    help the language model; ``retriever`` takes the lists of the retriever, which is cross-fitted for that; ``pool``
    draws them from the retrieval stage's best 200, cross-fitted too, so that the language model learns what it adds to
    the stage's scores, from candidates that differ more than the best 20."""
    order: Order = "shuffled"
    """Order of the training candidates: ``shuffled``, or ``retriever`` as in serving, where the letters carry the
    retriever's ranking. ``retriever`` needs the negatives of that name; all others are always shuffled."""
    pools: int = 1
    """Number of prompts for one training position, with the same history and different candidates, or, for
    ``retriever`` negatives, the same candidates in different orders."""
    folds: int = 4
    """Number of folds of users for cross-fitting the retriever, for the negatives ``retriever`` and ``pool``."""
    candidates: int = MAX_CANDIDATES
    """Number of candidates in a training prompt; 20 in the paper. A ranker that reads letters or lines serves at most
    as many as it was trained on."""
    validate_by: ValidateBy = "alone"
    """Measure that selects the best adapters: NDCG@10 of the language model ``alone``, as in the paper, or ``fused``
    with the retriever at the fitted weight, as served. Choose ``fused`` for ``lines``, which seldom beat the retriever
    alone; fused, they start from its order."""
    validation_users: int | None = None
    """Maximum number of users to validate on during training: a fixed random sample of the users whose item the
    retriever found; all of those users if absent."""
    full_validation: bool = True
    """Whether to validate the best adapters on all of those users at the end, and to fit the retriever's weight on them
    instead of the sample."""
    validate_every: int = 100
    """Number of steps between two validations; there is one before the first step and one after the last."""
    patience: int = 20
    """Number of validations without a better NDCG@10 after which training stops."""
    checkpoint_minutes: float = 10.0
    """Minimum time in minutes between two checkpoints, from which an interrupted training resumes. There is one after
    each validation too."""
    checkpoint_every: int = 20
    """Number of steps after which losses are read from the device, and the clock is looked at for a checkpoint."""
    max_history: int = 20
    """Maximum number of history items in a prompt."""
    title_tokens: int = 32
    """Maximum number of tokens in a title; the rest of it is cut off."""
    max_tokens: int = 1536
    """Maximum number of tokens in a prompt."""
    seed: int = 42
    """Random seed."""
    device: str = "auto"
    """Device of the training: ``auto`` (the first GPU if there is one), ``cpu``, ``gpu`` or ``gpu:N``."""
    threads: int | None = None
    """Number of processor threads; PyTorch's default if absent."""

    def __post_init__(self) -> None:
        counts = (
            "rank",
            "batch_size",
            "micro_batch_size",
            "epochs",
            "validate_every",
            "patience",
            "alpha",
            "max_history",
            "pools",
            "checkpoint_every",
        )
        optional = ("layers", "depth", "max_prompts", "max_user_prompts", "validation_users", "threads")
        for name in (*counts, "title_tokens", "max_tokens", *optional):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")
        for name, kind in CHOICES.items():
            *others, last = get_args(kind)
            if (chosen := getattr(self, name)) not in (*others, last):
                raise InputError(f"{name} must be {', '.join(others)} or {last}, not {chosen!r}")
        if self.order == "retriever" and (self.negatives != "retriever" or self.pools > 1):
            raise InputError("order retriever needs the retriever's lists: set negatives to retriever and pools to 1")
        if not self.independent and not 2 <= self.candidates <= len(LETTERS):
            raise InputError(
                f"candidates must be 2 to {len(LETTERS)}, not {self.candidates}: with --read {self.read} each has an"
                f" index letter; --read independent-lines takes up to {MOST_CANDIDATES}"
            )
        if self.independent and not 2 <= self.candidates <= MOST_CANDIDATES:
            raise InputError(f"candidates must be 2 to {MOST_CANDIDATES}, not {self.candidates}")
        if self.folds < 2:
            raise InputError(
                f"folds must be at least 2, not {self.folds}: a retriever must not rank users that it was trained on"
            )
        if not self.checkpoint_minutes >= 0:
            raise InputError(f"checkpoint_minutes must be at least 0, not {self.checkpoint_minutes}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if not self.learning_rate > 0 or not self.clip > 0 or self.warmup_steps < 0:
            raise InputError("learning_rate and clip must be above 0, and warmup_steps at least 0")
        if self.random_prompts < 0:
            raise InputError(f"random_prompts must be at least 0, not {self.random_prompts}")

    @property
    def independent(self) -> bool:
        """Whether each candidate's line is computed as if it were the only one."""
        return self.read == "independent-lines"

    def prompt_settings(self) -> PromptSettings:
        """Return the limits of the prompts that this training and its ranker build."""
        return PromptSettings(
            max_history=self.max_history,
            title_tokens=self.title_tokens,
            max_tokens=self.max_tokens,
            candidates=MOST_CANDIDATES if self.independent else self.candidates,
            independent=self.independent,
        )


SMALL = {
    "read": "lines",
    "depth": 12,
    "quantisation": "none",
    "rank": 16,
    "dropout": 0.0,
    "targets": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "learning_rate": 5e-4,
    "batch_size": 4,
    "max_history": 10,
    "title_tokens": 12,
    "max_user_prompts": 5,
    "validate_by": "fused",
}
BRIEF = {**SMALL, "learning_rate": 1e-3, "full_validation": False}
"""Options of short trainings, whose few steps must be large. With some hundred steps of this size, the loss may return
to chance level (docs/results/ranker.md)."""
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "demo": {
        **BRIEF,
        "depth": 6,
        "max_prompts": 256,
        "validation_users": 48,
        "validate_every": 32,
        "full_validation": True,
    },
    "quick": {**BRIEF, "max_prompts": 16, "validation_users": 8, "validate_every": 4},
    "paper": {},
    "llama2-7b": {},
    "smollm2-135m": {**SMALL, "max_prompts": 6000, "validation_users": 300, "validate_every": 125},
}
"""Options by name.

- ``paper`` and ``llama2-7b``: the paper's options, for any base and for the paper's own.
- ``smollm2-135m``: for the embedded base on two cores. It keeps the lower 12 of 30 layers, reads the candidates' lines,
  and trains on 6,000 prompts of 10 history items and titles of 12 tokens, at most 5 prompts per user (3,000 prompts for
  the 610 users of ml-latest-small), with a validation every 500 prompts.
- ``demo``: takes minutes on two cores, with half as many layers.
- ``quick``: for trying the later stages; its rankings are hardly better than the retriever's.
"""
PRESET_BASES: Mapping[str, str] = {"llama2-7b": "meta-llama/Llama-2-7b-hf"}
"""Base of each preset that does not use the embedded one."""
