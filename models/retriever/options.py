"""How a retriever is trained, and the named presets."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from preprocessing.errors import InputError

ARCHITECTURES = ("lrurec", "sasrec", "bert4rec", "narm")
LOSSES = ("softmax", "binary", "cloze")
MASKS = ("history", "last-window")


@dataclass(frozen=True, kw_only=True)
class RetrieverTraining:
    """How a retriever is trained. The defaults are the paper's for sequences of at most 50 items."""

    model: str = "lrurec"
    """Architecture, one of :data:`ARCHITECTURES`; ``lrurec`` is the paper's retriever."""
    loss: str | None = None
    """One of :data:`LOSSES`: full ``softmax`` unless given, SASRec's own ``binary``; BERT4Rec's is ``cloze``."""
    width: int = 64
    """Size of the item embeddings."""
    blocks: int = 2
    """Number of blocks, or of the GRU's layers."""
    heads: int = 1
    """Of the attention."""
    masked_share: float = 0.2
    """Of the items that BERT4Rec fills in: its authors mask .2 of MovieLens' and .6 of Beauty's (Sun et al. 2019)."""
    dropout: float = 0.2
    max_length: int = 50
    """Most recent items of a history that the model reads."""
    learning_rate: float = 1e-3
    """AdamW step size."""
    weight_decay: float = 0.01
    """On everything but biases and norms."""
    clip: float = 5.0
    """Largest norm of a step's gradient."""
    batch_size: int = 64
    """Windows a step."""
    epochs: int = 500
    validate_every: int = 500
    """Steps between two validations; there is one before the first step too."""
    patience: int = 20
    """Validations without a better Recall@10 before training stops."""
    mask: str = "history"
    """What is never recommended in validation and test: the whole ``history``, as in serving, or ``last-window``, only
    the items that the model reads, as its authors evaluate it."""
    seed: int = 42
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.model not in ARCHITECTURES:
            raise InputError(f"there is no retriever {self.model!r}: choose one of {', '.join(ARCHITECTURES)}")
        if self.loss is not None and self.loss not in LOSSES:
            raise InputError(f"there is no loss {self.loss!r}: choose one of {', '.join(LOSSES)}")
        if self.loss is not None and (self.loss == "cloze") != (self.model == "bert4rec"):
            raise InputError(f"{self.model} does not learn by {self.loss}: cloze is BERT4Rec's, and its only one")
        if self.mask not in MASKS:
            raise InputError(f"there is no mask {self.mask!r}: choose one of {', '.join(MASKS)}")
        for name in ("width", "blocks", "heads", "max_length", "batch_size", "epochs", "validate_every", "patience"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.width % self.heads:
            raise InputError(f"{self.heads} heads cannot share a width of {self.width}")
        if not 0 < self.masked_share <= 1:
            raise InputError(f"masked_share must be above 0 and at most 1, not {self.masked_share}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be at least 0 and below 1, not {self.dropout}")


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "demo": {
        "max_length": 100,
        "batch_size": 64,
        "learning_rate": 2e-3,
        "epochs": 60,
        "validate_every": 50,
        "patience": 6,
    },
    "paper": {},
    "paper-ml-latest-small": {"max_length": 200, "batch_size": 16},
    "sasrec-beauty": {"model": "sasrec", "dropout": 0.6, "batch_size": 512, "learning_rate": 5e-4, "epochs": 300},
}
"""Options by name: the paper's (``paper`` for Beauty and Games), what a SASRec with full cross-entropy is trained with
elsewhere on Beauty, and ``demo``, two minutes on two cores."""
