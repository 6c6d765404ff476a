"""Trains a retriever and writes its candidates: the first stage of LlamaRec (paper, sections 3.2 and 4.0.4)."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from client.contract import MAX_CANDIDATES
from models.metrics import recall, summary
from models.retriever.batches import inputs_and_targets, training_windows
from models.retriever.bert4rec import BERT4Rec
from models.retriever.lrurec import LRURec
from models.retriever.narm import NARM
from models.retriever.objectives import Loss, binary_loss, cloze_loss, next_item_loss
from models.retriever.ranking import rank_users, write_candidates
from models.retriever.sasrec import SASRec
from preprocessing.artifacts import is_finished, new_artifact, read_manifest
from preprocessing.data import Data, load_data
from preprocessing.errors import InputError
from preprocessing.progress import progress_bar

KIND = "retriever"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True)
class RetrieverTraining:
    """How a retriever is trained. The defaults are the paper's for sequences of at most 50 items."""

    model: str = "lrurec"
    """Architecture, one of :data:`MODELS`; ``lrurec`` is the paper's retriever."""
    loss: str | None = None
    """One of :data:`LOSSES`: full ``softmax`` unless given, SASRec's own ``binary``; BERT4Rec's is ``cloze``."""
    width: int = 64
    """Size of the item embeddings."""
    blocks: int = 2
    """Number of blocks, or of the GRU's layers."""
    heads: int = 1
    """Of the attention."""
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
    seed: int = 42
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise InputError(f"there is no retriever {self.model!r}: choose one of {', '.join(MODELS)}")
        if self.loss is not None and self.loss not in LOSSES:
            raise InputError(f"there is no loss {self.loss!r}: choose one of {', '.join(LOSSES)}")
        if self.loss is not None and (self.loss == "cloze") != (self.model == "bert4rec"):
            raise InputError(f"{self.model} does not learn by {self.loss}: cloze is BERT4Rec's, and its only one")
        for name in ("width", "blocks", "heads", "max_length", "batch_size", "epochs", "validate_every", "patience"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.width % self.heads:
            raise InputError(f"{self.heads} heads cannot share a width of {self.width}")
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


def train_retriever(options: RetrieverTraining, artifacts: Path) -> dict[str, Any]:
    """Trains, keeps the weights of the best validation, and writes ``artifacts/retriever``.

    The folder holds the weights, ``candidates-validation.parquet`` and ``candidates-test.parquet`` (the top 20 of every
    user and the true item's place among all items) and ``metrics.json``. A folder that these options and this data made
    already is left as it is.

    Returns:
        the metrics: ``{"validation": {...}, "test": {...}, "steps": n, ...}``.

    Raises:
        InputError: ``artifacts`` holds no preprocessed data.
    """
    data_manifest = read_manifest(artifacts / "data", "data", "llamarec preprocess")
    folder, inputs = artifacts / "retriever", {"data": data_manifest.fingerprint}
    if is_finished(folder, KIND, options=asdict(options), inputs=inputs):
        metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        return metrics
    data = load_data(artifacts)
    facts = {"dataset": data.name, "users": len(data.users), "items": data.catalogue.trained}
    with new_artifact(folder, KIND, options=asdict(options), inputs=inputs, facts=facts) as partial:
        model, progress = _fit(options, data)
        save_file(model.state_dict(), partial / WEIGHTS)
        (partial / CONFIG).write_text(json.dumps({**asdict(options), "items": data.catalogue.trained}, indent=1))
        metrics = dict(progress)
        for split, histories, truth in (
            ("validation", data.training, data.validation),
            ("test", [*map(np.append, data.training, data.validation)], data.test),
        ):
            path = partial / f"candidates-{split}.parquet"
            ranks = write_candidates(path, model, options.max_length, data.users, histories, truth)
            metrics[split] = {**summary(ranks), f"Recall@{MAX_CANDIDATES}": recall(ranks, MAX_CANDIDATES)}
        (partial / "metrics.json").write_text(json.dumps(metrics, indent=1))
    return metrics


def load_retriever(folder: Path) -> tuple[Any, RetrieverTraining]:
    """The trained model, in evaluation mode on the CPU, and the options that made it.

    Raises:
        InputError: ``folder`` is no finished retriever.
    """
    read_manifest(folder, KIND, "llamarec train-retriever")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    items = config.pop("items")
    options = RetrieverTraining(**config)
    model = build_model(options, items)
    model.load_state_dict(load_file(folder / WEIGHTS))
    return model.eval(), options


MODELS: Mapping[str, Callable[[RetrieverTraining, int], nn.Module]] = {
    "lrurec": lambda o, items: LRURec(items, o.width, o.blocks, o.dropout),
    "sasrec": lambda o, items: SASRec(items, o.max_length, o.width, o.blocks, o.heads, o.dropout),
    "bert4rec": lambda o, items: BERT4Rec(items, o.max_length, o.width, o.blocks, o.heads, o.dropout),
    "narm": lambda o, items: NARM(items, o.width, o.blocks, o.dropout),
}
"""Every architecture of the paper by the name that `--model` takes, built from options and the number of items."""
LOSSES: Mapping[str, Loss] = {"softmax": next_item_loss, "binary": binary_loss, "cloze": cloze_loss}
"""Every loss by its name."""


def build_model(options: RetrieverTraining, items: int) -> Any:
    """The architecture that the options name, freshly initialised."""
    return MODELS[options.model](options, items)


def _fit(options: RetrieverTraining, data: Data) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(options.seed)
    shuffle = np.random.default_rng(options.seed)
    model = build_model(options, data.catalogue.trained).to(options.device)
    optimizer = make_optimizer(model, options)
    inputs, targets = inputs_and_targets(training_windows(data.training, options.max_length), options.max_length)
    learn = LOSSES[options.loss or ("cloze" if options.model == "bert4rec" else "softmax")]
    steps = options.epochs * -(-len(inputs) // options.batch_size)
    best, best_state, best_step, waited, step = -1.0, model.state_dict(), 0, 0, 0
    started = time.perf_counter()
    with progress_bar() as bar:
        task = bar.add_task(f"training {options.model}", total=steps, note="")
        while True:
            if step % options.validate_every == 0 or step == steps:
                reached = recall(rank_users(model, options.max_length, data.training, data.validation), 10)
                waited += 1
                if reached > best:
                    best, best_step, waited = reached, step, 0
                    best_state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
                bar.update(task, note=f"validation Recall@10 {best:.4f}")
                if waited >= options.patience or step == steps:
                    break
            place = step % -(-len(inputs) // options.batch_size)
            if place == 0:
                order = shuffle.permutation(len(inputs))
            rows = order[place * options.batch_size : (place + 1) * options.batch_size]
            batch = (torch.from_numpy(array[rows]).to(options.device) for array in (inputs, targets))
            model.train()
            loss = learn(model, *batch)
            if not torch.isfinite(loss):
                raise InputError(
                    f"the loss is {float(loss)} at step {step + 1}, learning rate {options.learning_rate:g}: lower it"
                )
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
            optimizer.step()
            step += 1
            bar.update(task, completed=step)
        bar.update(task, total=step)
    model.load_state_dict(best_state)
    seconds = time.perf_counter() - started
    return model.cpu(), {
        "steps": step,
        "best_step": best_step,
        "best_validation_Recall@10": best,
        "seconds": round(seconds, 1),
    }


def make_optimizer(model: nn.Module, options: RetrieverTraining) -> torch.optim.AdamW:
    """AdamW; biases and norms don't decay."""
    named = dict(model.named_parameters())
    plain = [name for name in named if "norm" in name or name.endswith("bias")]
    groups = [
        {"params": [named[name] for name in named if name not in plain], "weight_decay": options.weight_decay},
        {"params": [named[name] for name in plain], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, eps=1e-9)
