"""How a ranker is trained, and the named presets."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from llamarec_client.contract import MAX_CANDIDATES
from models.ranker.prompt import LETTERS
from preprocessing.errors import InputError

Negatives = Literal["random", "popular", "retriever"]
Order = Literal["shuffled", "retriever"]
Read = Literal["letters", "lines"]
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
    """How a ranker is trained. The defaults are the paper's (section 4.0.4)."""

    rank: int = 8
    """Rank of the adapters."""
    alpha: int = 32
    """Adapters are scaled by ``alpha / rank``."""
    dropout: float = 0.05
    """On what enters an adapter."""
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Projections that get an adapter."""
    layers: int | None = None
    """How many of the upper layers get adapters; all if absent. Nothing below is computed backwards."""
    quantisation: Quantisation = "nf4"
    """Of the frozen base: ``nf4`` (QLoRA) or ``none`` (plain LoRA)."""
    dtype: TrainingDtype = "auto"
    """Of the arithmetic: ``bfloat16``, ``float32``, or ``auto``: bf16 where the hardware multiplies it natively."""
    learning_rate: float = 1e-4
    """AdamW step size after warm-up; it falls linearly to 0 at the end."""
    warmup_steps: int = 100
    """Steps of linear warm-up, but at most a tenth of all steps."""
    clip: float = 1.0
    """Largest norm of a step's gradient."""
    batch_size: int = 16
    """Prompts a step."""
    micro_batch_size: int = 4
    """Prompts computed at once: less takes less memory, the result is the same."""
    gradient_checkpointing: bool = False
    """Recompute layers in the backward pass: a third of the memory for a third more time."""
    epochs: int = 1
    max_prompts: int | None = None
    """Most different prompts to train on, a random sample; all there are if absent."""
    max_user_prompts: int | None = None
    """Most prompts of one user, so that long sequences don't dominate; no limit if absent."""
    read: Read = "letters"
    """What the ranking is read from: the ``letters`` behind the prompt as in the paper, or the ends of the candidates'
    ``lines``, which a small base learns to use in a fraction of the prompts."""
    depth: int | None = None
    """How many of the base's lower layers are kept, all if absent. Letters want them all."""
    random_prompts: int = 0
    """Prompts with random candidates before those of the retriever's ``negatives``: among
    strangers titles differ more."""
    negatives: Negatives = "random"
    """Of the training candidates: uniformly ``random`` as in the paper; ``popular``, drawn by how often they stand in
    the training sequences, so that popularity, which the retriever knows, tells the model nothing; or the
    ``retriever``'s own lists, for which it is cross-fitted."""
    order: Order = "shuffled"
    """Of the training candidates; random ones are always shuffled. In the ``retriever`` order, as at serving, the
    letters carry its opinion."""
    pools: int = 1
    """Prompts of one position, with the same history and other candidates, or others in another order."""
    folds: int = 4
    """Of users, for cross-fitting the retriever."""
    candidates: int = MAX_CANDIDATES
    """In a prompt. The paper's, and what the server retrieves, are 20."""
    validate_by: ValidateBy = "alone"
    """Whose NDCG@10 chooses the adapters: that of the language model ``alone`` as in the paper, or ``fused`` with the
    retriever at the fitted weight, as served. Before the first step lines leave the retriever's order as it is, which
    alone they seldom beat: for them ``fused`` is the one to take."""
    validation_users: int | None = None
    """Most users to validate on during training, a fixed random sample of those whose item the retriever found; all of
    them if absent."""
    full_validation: bool = True
    """Validate the best adapters on every such user at the end; the retriever's weight is chosen on them."""
    validate_every: int = 100
    """Steps between two validations; there is one before the first step and one after the last."""
    patience: int = 20
    """Validations without a better NDCG@10 before training stops."""
    checkpoint_every: int = 20
    """Steps between two checkpoints, from which an interrupted training goes on."""
    max_history: int = 20
    """Most history items in a prompt."""
    title_tokens: int = 32
    """Tokens after which a title is cut."""
    max_tokens: int = 1536
    """Most tokens of a prompt."""
    seed: int = 42
    device: str = "cpu"
    threads: int | None = None
    """Threads on the processor; all of them if absent."""

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
            raise InputError("the retriever's order is that of its own list: set negatives to retriever and pools to 1")
        if not 2 <= self.candidates <= len(LETTERS):
            raise InputError(f"candidates must be 2 to {len(LETTERS)}, not {self.candidates}: each has an index letter")
        if self.folds < 2:
            raise InputError(f"folds must be at least 2, not {self.folds}: a retriever must not rank what it learned")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if not self.learning_rate > 0 or not self.clip > 0 or self.warmup_steps < 0:
            raise InputError("learning_rate and clip must be above 0 and warmup_steps not below it")
        if self.random_prompts < 0:
            raise InputError(f"random_prompts must be at least 0, not {self.random_prompts}")


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
"""Few steps are large ones; some hundreds of this size may end at chance again (docs/results/ranker.md)."""
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "demo": {**BRIEF, "max_prompts": 256, "validation_users": 48, "validate_every": 32},
    "quick": {**BRIEF, "max_prompts": 16, "validation_users": 8, "validate_every": 4},
    "paper": {},
    "llama2-7b": {},
    "smollm2-135m": {**SMALL, "max_prompts": 6000, "validation_users": 300, "validate_every": 125},
}
"""Options by name: the paper's (``paper`` for any base, ``llama2-7b`` for its own); ``smollm2-135m`` for the embedded
base on two cores: the lower 12 of its 30 layers read at the candidates' lines, 6,000 prompts of 10 history items and
titles of 12 tokens but at most 5 of a user (3,000 of the 610 of ml-latest-small), validated every 500; ``demo``,
bounded to minutes on two cores; and ``quick``, for trying what comes after: its answers are hardly better than the
retriever's."""
PRESET_BASES: Mapping[str, str] = {"llama2-7b": "meta-llama/Llama-2-7b-hf"}
"""The base of a preset, where it is another than the embedded one."""
