"""Options of a retriever's training, and the named presets."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from preprocessing.errors import InputError

ARCHITECTURES = ("lrurec", "sasrec", "bert4rec", "narm")
LOSSES = ("softmax", "binary", "cloze")
MASKS = ("history", "last-window")
TITLES = ("none", "words", "model")


@dataclass(frozen=True, kw_only=True)
class RetrieverTraining:
    """Options of a retriever's training. The defaults are the paper's for sequences of at most 50 items."""

    model: str = "lrurec"
    """Architecture, one of :data:`ARCHITECTURES`; ``lrurec`` is the paper's retriever."""
    loss: str | None = None
    """Loss, one of :data:`LOSSES`: full ``softmax``, or ``binary``, SASRec's own. BERT4Rec always has ``cloze``. If
    absent, ``cloze`` for BERT4Rec and ``softmax`` for all others."""
    negatives: int | None = None
    """Number of random items in the denominator of the ``softmax`` loss, next to the targets of the batch; all items
    are in it if absent. For catalogues of hundreds of thousands of items."""
    width: int = 64
    """Size of the item embeddings."""
    blocks: int = 2
    """Number of blocks, or of the GRU's layers."""
    heads: int = 1
    """Number of attention heads."""
    titles: str = "none"
    """What an item's vector contains of its title, one of :data:`TITLES`: nothing (the paper), a projection of its
    ``words``, or of the states of a language ``model``."""
    masked_share: float = 0.2
    """Share of the items that are masked for BERT4Rec; its authors mask 0.2 on MovieLens and 0.6 on Beauty (Sun et al.
    2019)."""
    untrained: bool = True
    """Whether the catalogue's items that no training sequence contains are retrieved too, by their titles; without
    titles they are not."""
    signals: bool = False
    """Whether popularity, title likeness, transitions and co-occurrence reorder the retriever's best items, with
    weights that are fitted on validation users."""
    pool: int = 200
    """Number of the retriever's best items that the signals reorder."""
    second: str | None = None
    """Preset of a second retriever, whose best items join the pool and whose scores join the signals."""
    dropout: float = 0.2
    """Share of activations that are dropped in training."""
    max_length: int = 50
    """Maximum number of history items that the model reads; the most recent ones are kept."""
    learning_rate: float = 1e-3
    """AdamW step size."""
    weight_decay: float = 0.01
    """AdamW weight decay of all parameters but biases and norms."""
    clip: float = 5.0
    """Maximum norm of a step's gradient; a larger gradient is scaled down to it."""
    batch_size: int = 64
    """Number of windows in a step."""
    epochs: int = 500
    """Maximum number of passes over the training windows."""
    validate_every: int = 500
    """Number of steps between two validations; there is one before the first step and one after the last."""
    validation_users: int | None = None
    """Number of users, chosen at random, whose validation items are ranked to stop the training; all if absent. The
    metrics of the finished training are over all users."""
    patience: int = 20
    """Number of validations without a better Recall@10 after which training stops."""
    mask: str = "history"
    """Items that are never recommended in validation and test: the whole ``history``, as in serving, or
    ``last-window``, only the items that the model reads, as LRURec's authors evaluate."""
    seed: int = 42
    """Random seed."""
    device: str = "auto"
    """Device of the training: ``auto`` (the first GPU if there is one), ``cpu``, ``gpu`` or ``gpu:N``."""

    def __post_init__(self) -> None:
        if self.model not in ARCHITECTURES:
            raise InputError(f"there is no retriever {self.model!r}: choose one of {', '.join(ARCHITECTURES)}")
        if self.loss is not None and self.loss not in LOSSES:
            raise InputError(f"there is no loss {self.loss!r}: choose one of {', '.join(LOSSES)}")
        if self.loss is not None and (self.loss == "cloze") != (self.model == "bert4rec"):
            raise InputError(f"{self.model} cannot train with loss {self.loss}: use cloze for bert4rec, and only there")
        if self.negatives is not None and (self.model == "bert4rec" or self.loss == "binary"):
            raise InputError("negatives are a sample of the softmax: use them with loss softmax only")
        if self.mask not in MASKS:
            raise InputError(f"there is no mask {self.mask!r}: choose one of {', '.join(MASKS)}")
        if self.titles not in TITLES:
            raise InputError(f"there are no titles {self.titles!r}: choose one of {', '.join(TITLES)}")
        for name in (
            "width",
            "blocks",
            "heads",
            "max_length",
            "batch_size",
            "epochs",
            "validate_every",
            "patience",
            "pool",
            "negatives",
            "validation_users",
        ):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")
        if self.second is not None and self.second not in PRESETS:
            raise InputError(f"there is no preset {self.second!r}: choose one of {', '.join(PRESETS)}")
        if self.second is not None and not self.signals:
            raise InputError("a second retriever is weighed together with the signals: use signals too")
        if self.width % self.heads:
            raise InputError(f"width {self.width} is not a multiple of heads {self.heads}")
        if not 0 < self.masked_share <= 1:
            raise InputError(f"masked_share must be above 0 and at most 1, not {self.masked_share}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be at least 0 and below 1, not {self.dropout}")

    @property
    def whole_catalogue(self) -> bool:
        """Whether items are retrieved that no training sequence contains."""
        return self.untrained and self.titles != "none"

    def second_options(self) -> "RetrieverTraining":
        """Return the options of the second retriever: its preset, with the seed and device of the first.

        It reads titles as its preset says, or else as the first retriever does.
        """
        assert self.second is not None
        shared = {name: getattr(self, name) for name in ("mask", "seed", "device", "validation_users")}
        # Both retrievers score the same items.
        alone = {"untrained": self.whole_catalogue, "signals": False, "second": None}
        return RetrieverTraining(**{"titles": self.titles, **PRESETS[self.second], **shared, **alone})


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "default": {"titles": "words", "signals": True, "dropout": 0.5, "validate_every": 200, "patience": 8},
    "demo": {
        "titles": "words",
        "signals": True,
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
"""Options by name.

- ``default``: LRURec with the words of titles, reordered by the signals; see docs/results/retrievers.md.
- ``demo``: takes minutes on two cores.
- ``paper``, ``paper-ml-latest-small``: the paper's options, for Beauty and Games, and for ml-latest-small.
- ``sasrec-beauty``: options from the literature for SASRec with full cross-entropy on Beauty.
"""
