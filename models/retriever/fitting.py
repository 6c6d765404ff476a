"""The training loop of every retriever: one for all architectures, on one process or several."""

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from models.metrics import recall
from models.retriever.batches import inputs_and_targets, training_windows
from models.retriever.bert4rec import BERT4Rec
from models.retriever.lrurec import LRURec
from models.retriever.narm import NARM
from models.retriever.objectives import Loss, binary_loss, cloze_loss, next_item_loss
from models.retriever.options import RetrieverTraining
from models.retriever.ranking import rank_users
from models.retriever.sasrec import SASRec
from preprocessing.data import Data
from preprocessing.errors import InputError
from preprocessing.progress import progress_bar

MODELS: Mapping[str, Callable[[RetrieverTraining, int], nn.Module]] = {
    "lrurec": lambda o, items: LRURec(items, o.width, o.blocks, o.dropout),
    "sasrec": lambda o, items: SASRec(items, o.max_length, o.width, o.blocks, o.heads, o.dropout),
    "bert4rec": lambda o, items: BERT4Rec(items, o.max_length, o.width, o.blocks, o.heads, o.dropout),
    "narm": lambda o, items: NARM(items, o.width, o.blocks, o.dropout),
}
"""Every architecture of the paper by the name that `--model` takes, built from options and the number of items."""
LOSSES: Mapping[str, Loss] = {"softmax": next_item_loss, "binary": binary_loss, "cloze": cloze_loss}
"""Every loss by its name."""

Watch = Callable[[int, float], None]
"""Told the step and the Recall@10 of every validation; whatever it raises ends the training."""


@dataclass
class Course:
    """How far a training has come: everything of it but the tensors."""

    step: int = 0
    best: float = -1.0
    """Best validation Recall@10."""
    best_step: int = 0
    waited: int = 0
    """Validations since."""
    seconds: float = 0.0
    curve: list[tuple[int, float | None, float]] = field(default_factory=list)
    """Step, mean training loss since the validation before, and Recall@10 of every validation."""


def build_model(options: RetrieverTraining, items: int) -> Any:
    """The architecture that the options name, freshly initialised."""
    return MODELS[options.model](options, items)


def make_optimizer(model: nn.Module, options: RetrieverTraining) -> torch.optim.AdamW:
    """AdamW; biases and norms don't decay."""
    named = dict(model.named_parameters())
    plain = [name for name in named if "norm" in name or name.endswith("bias")]
    groups = [
        {"params": [named[name] for name in named if name not in plain], "weight_decay": options.weight_decay},
        {"params": [named[name] for name in plain], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, eps=1e-9, fused=True)


class Checkpoint:
    """The file from which an interrupted training goes on. It is tied to the options and the data set of its training."""

    def __init__(self, path: Path, options: RetrieverTraining, data: Data) -> None:
        self.path = path
        self._made_by = {"options": asdict(options), "data": data.fingerprint}

    def save(self, state: dict[str, Any]) -> None:
        """Writes the state of a training, aside and renamed."""
        partial = self.path.with_name(f".{self.path.name}.partial")
        torch.save({"made_by": json.dumps(self._made_by, sort_keys=True), **state}, partial)
        os.replace(partial, self.path)

    def load(self) -> dict[str, Any] | None:
        """The saved state, or None where there is none.

        Raises:
            InputError: the file is damaged, or of another training.
        """
        if not self.path.exists():
            return None
        remedy = f"finish that training with its own options, or delete {self.path}"
        try:
            state: dict[str, Any] = torch.load(self.path, weights_only=True)
            made_by = json.loads(state.pop("made_by"))
        except Exception as error:
            raise InputError(f"{self.path} cannot be read as a checkpoint ({error}): delete it") from None
        if made_by["data"] != self._made_by["data"]:
            raise InputError(f"{self.path} is the checkpoint of a training on another data set: {remedy}")
        for name, value in self._made_by["options"].items():
            if (found := made_by["options"].get(name)) != value:
                raise InputError(f"{self.path} is the checkpoint of a training with {name} {found}, not {value}: {remedy}")
        return state

    def remove(self) -> None:
        """Deletes the file; a training that has ended needs it no more."""
        self.path.unlink(missing_ok=True)


def fit(
    options: RetrieverTraining, data: Data, checkpoint: Checkpoint, logs: Path, watch: Watch | None = None
) -> tuple[Any, Course]:
    """Trains until validation Recall@10 stops rising.

    Under ``accelerate launch`` each process computes its share of every batch and of every validation. Gradients are
    summed over the processes and divided by the number of predictions in the whole batch, so a step is the same step
    on any number of processes, up to rounding and, with dropout, the masks.

    Args:
        options: see :class:`RetrieverTraining`.
        data: the sequences.
        checkpoint: written at every validation, and gone on from where it is there.
        logs: folder of the TensorBoard events.
        watch: told of every validation.

    Returns:
        the model with the weights of the best validation, on the processor, and the course of the training.

    Raises:
        InputError: the loss is no number; the checkpoint is of another training.
    """
    processes = PartialState(cpu=options.device == "cpu")
    device = processes.device if options.device != "cpu" else torch.device("cpu")
    torch.manual_seed(options.seed)
    model = build_model(options, data.catalogue.trained).to(device)
    optimizer = make_optimizer(model, options)
    torch.manual_seed(options.seed + 1 + processes.process_index)  # dropout masks of its own for each process
    inputs, targets = inputs_and_targets(training_windows(data.training, options.max_length), options.max_length)
    learn = LOSSES[options.loss or ("cloze" if options.model == "bert4rec" else "softmax")]
    steps_an_epoch = -(-len(inputs) // options.batch_size)
    steps = options.epochs * steps_an_epoch
    course, best_state = Course(), _copy(model)
    if state := checkpoint.load():
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        best_state, course = state["best"], Course(**json.loads(state["course"]))
        torch.set_rng_state(state["random"][processes.process_index])
    writer = SummaryWriter(str(logs), purge_step=course.step + 1) if processes.is_main_process else None
    began, losses = time.perf_counter() - course.seconds, []
    order_of, order = -1, np.empty(0, np.int64)
    resumed_at = course.step if state else None
    with progress_bar() as bar:
        task = bar.add_task(f"training {options.model}", total=steps, completed=course.step, note="")
        while True:
            if (course.step % options.validate_every == 0 or course.step == steps) and course.step != resumed_at:
                reached = recall(validation_ranks(model, options.max_length, data, processes), 10)
                loss = float(np.mean(losses)) if losses else None
                losses = []
                course.curve.append((course.step, loss, reached))
                course.waited += 1
                if reached > course.best:
                    course.best, course.best_step, course.waited = reached, course.step, 0
                    best_state = _copy(model)
                course.seconds = time.perf_counter() - began
                bar.update(task, note=f"validation Recall@10 {reached:.4f}")
                _record(writer, checkpoint, processes, model, optimizer, best_state, course)
                if watch is not None:
                    watch(course.step, reached)
            if course.waited >= options.patience or course.step == steps:
                break
            epoch, place = divmod(course.step, steps_an_epoch)
            if epoch != order_of:  # of its own seed, so that a resumed training sees the same order
                order_of, order = epoch, np.random.default_rng((options.seed, epoch)).permutation(len(inputs))
            rows = order[place * options.batch_size : (place + 1) * options.batch_size]
            rows = rows[processes.process_index :: processes.num_processes]
            batch = (torch.from_numpy(array[rows]).to(device) for array in (inputs, targets))
            losses.append(_step(model, optimizer, learn, *batch, options, course.step, processes))
            course.step += 1
            bar.update(task, completed=course.step)
        bar.update(task, total=course.step)
    if writer is not None:
        writer.close()
    model.load_state_dict(best_state)
    return model.cpu(), course


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def _step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    learn: Loss,
    inputs: Tensor,
    targets: Tensor,
    options: RetrieverTraining,
    step: int,
    processes: PartialState,
) -> float:
    """One step of the optimiser; returns the batch's mean loss."""
    model.train()
    optimizer.zero_grad(set_to_none=True)
    total, count = learn(model, inputs, targets) if len(inputs) else (torch.zeros(()), 0)
    everywhere = torch.tensor([float(total.detach()), float(count)], dtype=torch.float64)
    if processes.num_processes > 1:
        everywhere = reduce(everywhere, "sum")
    loss, predictions = float(everywhere[0] / everywhere[1]), float(everywhere[1])
    if not np.isfinite(loss):
        raise InputError(f"the loss is {loss} at step {step + 1}, learning rate {options.learning_rate:g}: lower it")
    if count:
        torch.autograd.backward(total / predictions)
    if processes.num_processes > 1:
        for parameter in model.parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = reduce(grad, "sum")
    torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
    optimizer.step()
    return loss


def validation_ranks(model: Any, length: int, data: Data, processes: PartialState) -> np.ndarray[Any, Any]:
    """The place of every user's validation item; each process computes those of its share of the users."""
    share = slice(processes.process_index, None, processes.num_processes)
    ranks = rank_users(model, length, data.training[share], data.validation[share])
    if processes.num_processes == 1:
        return ranks
    return np.concatenate(gather_object([ranks]))


def _record(
    writer: SummaryWriter | None,
    checkpoint: Checkpoint,
    processes: PartialState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    best: dict[str, Tensor],
    course: Course,
) -> None:
    """Saves a validation: TensorBoard's events and the checkpoint, by the first process."""
    states = gather_object([torch.get_rng_state()]) if processes.num_processes > 1 else [torch.get_rng_state()]
    if writer is None:
        return
    step, loss, reached = course.curve[-1]
    writer.add_scalar("validation/Recall@10", reached, step)
    if loss is not None:
        writer.add_scalar("training/loss", loss, step)
    writer.flush()
    checkpoint.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "best": best,
            "course": json.dumps(asdict(course)),
            "random": states,
        }
    )
