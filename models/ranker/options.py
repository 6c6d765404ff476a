"""How a ranker is trained, and the named presets."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.ranker.examples import Negatives
from preprocessing.errors import InputError


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
    """Projections that get an adapter, in every layer."""
    quantisation: str = "nf4"
    """Of the frozen base: ``nf4`` (QLoRA) or ``none`` (bf16)."""
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
    negatives: Negatives = "random"
    """Of the training candidates: uniformly ``random`` as in the paper, or as often as the ``retriever`` lists them."""
    validation_users: int | None = None
    """Most users to validate on, a random sample of those whose item the retriever found; all of them if absent."""
    validate_every: int = 100
    """Steps between two validations; there is one before the first step and one after the last."""
    patience: int = 20
    """Validations without a better NDCG@10 before training stops."""
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
        )
        for name in (*counts, "title_tokens", "max_tokens", "max_prompts", "validation_users", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")
        if self.quantisation not in ("nf4", "none"):
            raise InputError(f"there is no quantisation {self.quantisation!r}: choose nf4 or none")
        if self.negatives not in ("random", "retriever"):
            raise InputError(f"there are no negatives {self.negatives!r}: choose random or retriever")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if not self.learning_rate > 0 or not self.clip > 0 or self.warmup_steps < 0:
            raise InputError("learning_rate and clip must be above 0 and warmup_steps not below it")


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "demo": {
        "batch_size": 4,
        "max_prompts": 112,
        "max_history": 10,
        "validation_users": 64,
        "validate_every": 14,
    },
    "paper": {},
}
"""Options by name: the paper's, and ``demo``, which ends within about five minutes on two cores."""
