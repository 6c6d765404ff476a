"""The retriever's training loop, for all architectures and for one process or several."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object, reduce
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from models.checkpoint import Checkpoint
from models.device import random_state, restore_random_state, sent, torch_device
from models.metrics import recall
from models.processes import processes_on
from models.retriever.architectures.build import build_model
from models.retriever.architectures.retriever import Retriever
from models.retriever.batches import Items, inputs_and_targets, training_windows
from models.retriever.fitting.objectives import Loss, binary_loss, cloze_loss, next_item_loss, sampled_loss
from models.retriever.options import RetrieverTraining
from models.retriever.ranking import rank_users
from preprocessing.data import Data
from preprocessing.errors import InputError
from preprocessing.progress import progress_bar

Watch = Callable[[int, float], None]
"""Function that is called with the step and Recall@10 of every validation; an exception in it ends the training."""


@dataclass
class TrainingProgress:
    """Progress of a training: its whole state except the tensors."""

    step: int = 0
    """Number of finished steps."""
    best: float = -1.0
    """Best validation Recall@10 so far."""
    best_step: int = 0
    waited: int = 0
    """Number of validations since the best one."""
    seconds: float = 0.0
    """Time spent in training steps and validations."""
    curve: list[tuple[int, float | None, float]] = field(default_factory=list)
    """For each validation: step, mean training loss since the previous one (None at the first) and Recall@10."""


def sent_histories(histories: Sequence[Items], options: RetrieverTraining) -> Sequence[Items]:
    """Return the histories for an evaluation: whole, or with ``last-window`` only the items that the model reads."""
    return histories if options.mask == "history" else [items[-options.max_length :] for items in histories]


def make_optimizer(model: Retriever, options: RetrieverTraining) -> torch.optim.AdamW:
    """Return an AdamW optimiser with weight decay on everything but biases and norms."""
    named = dict(model.named_parameters())
    plain = [name for name in named if "norm" in name or name.endswith("bias")]
    groups = [
        {"params": [named[name] for name in named if name not in plain], "weight_decay": options.weight_decay},
        {"params": [named[name] for name in plain], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, eps=1e-9, fused=True)


def fit(
    options: RetrieverTraining,
    data: Data,
    checkpoint: Checkpoint,
    logs: Path,
    watch: Watch | None = None,
    titles: NDArray[np.float32] | None = None,
    start: Mapping[str, Tensor] | None = None,
) -> tuple[Retriever, TrainingProgress]:
    """Train until validation Recall@10 stops rising.

    Under ``accelerate launch`` each process computes its share of every batch and of every validation. Gradients are
    summed over the processes and divided by the number of predictions in the whole batch, so a step is the same for any
    number of processes, up to rounding and the masks of dropout.

    Args:
        options: see :class:`RetrieverTraining`.
        data: the sequences.
        checkpoint: checkpoint that is written at every validation; if it exists, the training resumes from it.
        logs: folder for TensorBoard events.
        watch: see :data:`Watch`.
        titles: vectors of the trained items' titles [items + 1, dimensions], the padding's first; None for a model
            without titles.
        start: state of the model to go on from; by default, it is initialised at random.

    Returns:
        the model with the weights of the best validation, on the CPU, and the progress of the training.

    Raises:
        InputError: the loss is not finite, or the checkpoint belongs to another training.
    """
    training = _Training(options, data, checkpoint, titles, start)
    progress = training.progress
    writer = SummaryWriter(str(logs), purge_step=progress.step + 1) if training.processes.is_main_process else None
    with progress_bar() as bar:
        task = bar.add_task(f"training {options.model}", total=training.steps, completed=progress.step, note="")
        while True:
            validated = bool(progress.curve) and progress.curve[-1][0] == progress.step
            if (progress.step % options.validate_every == 0 or progress.step == training.steps) and not validated:
                training.validate()
                _, loss, reached = progress.curve[-1]
                bar.update(task, note=f"validation Recall@10 {reached:.4f}")
                if writer is not None:
                    _record(writer, progress.step, loss, reached)
                if watch is not None:
                    _tell(watch, progress.step, reached, checkpoint)
            if progress.waited >= options.patience or progress.step == training.steps:
                break
            training.take_step()
            bar.update(task, completed=progress.step)
        bar.update(task, total=progress.step)
    if writer is not None:
        writer.close()
    training.model.load_state_dict(training.best_state)
    model: Retriever = training.model.cpu()
    return model, progress


def loss_of(options: RetrieverTraining, counts: Tensor) -> Loss:
    """Return the loss.

    Args:
        options: see :class:`RetrieverTraining`.
        counts: number of times that each item is a target of the training [items + 1].
    """
    if options.model == "bert4rec":
        return partial(cloze_loss, masked_share=options.masked_share)
    if options.loss == "binary":
        return binary_loss
    if options.negatives is not None:
        return partial(sampled_loss, negatives=options.negatives, popularity=counts / counts.sum())
    return next_item_loss


def _validated(options: RetrieverTraining, users: int) -> NDArray[np.int64]:
    """Return the places of the users whose validation items stop the training."""
    if options.validation_users is None or options.validation_users >= users:
        return np.arange(users)
    return np.sort(np.random.default_rng(options.seed).permutation(users)[: options.validation_users])


class _Training:
    """Model, optimiser and progress of one training, in one of its processes; each phase of the loop is a method."""

    def __init__(
        self,
        options: RetrieverTraining,
        data: Data,
        checkpoint: Checkpoint,
        titles: NDArray[np.float32] | None,
        start: Mapping[str, Tensor] | None,
    ) -> None:
        self.options, self.data, self.checkpoint = options, data, checkpoint
        device = torch_device(options.device)
        self.processes = processes_on(device)
        # Under `accelerate launch` each process has a GPU of its own.
        alone = device == "cpu" or self.processes.num_processes == 1
        self.device = torch.device(device) if alone else self.processes.device
        torch.manual_seed(options.seed)
        vectors = None if titles is None else torch.from_numpy(titles)
        self.model = build_model(options, data.catalogue.trained, vectors).to(self.device)
        if start is not None:
            self.model.load_state_dict(start)
        self.optimizer = make_optimizer(self.model, options)
        torch.manual_seed(options.seed + 1 + self.processes.process_index)  # each process draws its own masks
        windows = training_windows(data.training, options.max_length)
        self.inputs, self.targets = inputs_and_targets(windows, options.max_length)
        counts = torch.from_numpy(np.bincount(np.concatenate(windows), minlength=data.catalogue.trained + 1))
        self.learn = loss_of(options, counts)
        self.validated = _validated(options, len(data.users))
        self.steps_an_epoch = -(-len(windows) // options.batch_size)
        self.steps = options.epochs * self.steps_an_epoch
        self.progress, self.best_state = TrainingProgress(), _copy(self.model)
        if state := checkpoint.load():
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.best_state, self.progress = state["best"], TrainingProgress(**json.loads(state["progress"]))
            restore_random_state(state["random"], self.device, self.processes.process_index)
        self._began = time.perf_counter() - self.progress.seconds
        self._losses: list[Tensor] = []
        """Loss of each step since the last validation."""
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def validate(self) -> None:
        """Measure Recall@10 on the validation items, keep the weights if they are the best, and write a checkpoint."""
        progress, losses = self.progress, self._read_losses()
        reached = recall(self._validation_ranks(), 10)
        progress.curve.append((progress.step, float(np.mean(losses)) if losses else None, reached))
        progress.waited += 1
        if reached > progress.best:
            progress.best, progress.best_step, progress.waited = reached, progress.step, 0
            self.best_state = _copy(self.model)
        progress.seconds = time.perf_counter() - self._began
        random = [random_state(self.device)]
        if self.processes.num_processes > 1:
            random = gather_object(random)
        if self.processes.is_main_process:
            self.checkpoint.save(
                {
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "best": self.best_state,
                    "progress": json.dumps(asdict(progress)),
                    "random": random,
                }
            )

    def _validation_ranks(self) -> NDArray[np.int32]:
        users = self.validated[self.processes.process_index :: self.processes.num_processes]
        histories = sent_histories([self.data.training[user] for user in users], self.options)
        ranks = rank_users(self.model, self.options.max_length, histories, self.data.validation[users])
        return ranks if self.processes.num_processes == 1 else np.concatenate(gather_object([ranks]))

    def take_step(self) -> None:
        """Take an optimiser step on the next batch; nothing in it waits for a GPU.

        Raises:
            InputError: the loss is not finite; on a GPU, the next validation raises it.
        """
        inputs, targets = self._next_batch()
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        # A process may have no rows in an epoch's last batch.
        none = (torch.zeros((), device=self.device), 0)
        total, count = self.learn(self.model, inputs, targets) if len(inputs) else none
        predictions = sent(torch.tensor(count, dtype=torch.float64), self.device)
        everywhere = torch.stack((total.detach().double(), predictions))
        if self.processes.num_processes > 1:
            everywhere = reduce(everywhere, "sum")
        loss, predictions = everywhere[0] / everywhere[1], everywhere[1]
        if self.device.type == "cpu":
            self._check(float(loss), self.progress.step + 1)
        if count:
            torch.autograd.backward(total / predictions.to(total.dtype))
        if self.processes.num_processes > 1:
            for parameter in self.model.parameters():
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = reduce(grad, "sum")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
        self.optimizer.step()
        self._losses.append(loss)
        self.progress.step += 1

    def _read_losses(self) -> list[float]:
        """Return the losses of the steps since the last validation, and forget them.

        Raises:
            InputError: one of them is not finite.
        """
        losses: list[float] = torch.stack(self._losses).tolist() if self._losses else []
        self._losses.clear()
        for step, loss in enumerate(losses, self.progress.step - len(losses) + 1):
            self._check(loss, step)
        return losses

    def _check(self, loss: float, step: int) -> None:
        if not np.isfinite(loss):
            rate = self.options.learning_rate
            raise InputError(f"the loss is {loss} at step {step}, learning rate {rate:g}: lower it")

    def _next_batch(self) -> tuple[Tensor, Tensor]:
        """Return this process's inputs and targets of the next batch, each [rows, length], on the processor."""
        epoch, place = divmod(self.progress.step, self.steps_an_epoch)
        if epoch != self._epoch:  # each epoch has its own seed, so that a resumed training keeps the order
            self._epoch = epoch
            self._order = np.random.default_rng((self.options.seed, epoch)).permutation(len(self.inputs))
        size = self.options.batch_size
        rows = self._order[place * size : (place + 1) * size]
        rows = rows[self.processes.process_index :: self.processes.num_processes]
        return torch.from_numpy(self.inputs[rows]), torch.from_numpy(self.targets[rows])


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def _record(writer: SummaryWriter, step: int, loss: float | None, reached: float) -> None:
    writer.add_scalar("validation/Recall@10", reached, step)
    if loss is not None:
        writer.add_scalar("training/loss", loss, step)
    writer.flush()


def _tell(watch: Watch, step: int, reached: float, checkpoint: Checkpoint) -> None:
    """Call ``watch``; if it ends the training by an exception, remove the checkpoint, which is then of no use."""
    try:
        watch(step, reached)
    except Exception:
        checkpoint.remove()
        raise
