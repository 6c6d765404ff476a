"""The ranker's training loop: tunes the adapters and keeps those of the best validation (paper, section 4.0.4).

Nothing in a step waits for the device: prompts are built ahead in a thread, and losses are read from the device at
validations and where the clock is looked at for a checkpoint.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.checkpoint import Checkpoint
from models.device import random_state, restore_random_state
from models.metrics import ndcg
from models.processes import (
    decided_by_first,
    gathered,
    processes_on,
    share_of,
    sum_gradients,
    summed,
)
from models.ranker.examples.sampling import Example
from models.ranker.fitting.ahead import prepared_ahead
from models.ranker.fitting.curves import CURVES_FILE, plot_curves
from models.ranker.fitting.fusion_fit import fit_fusion
from models.ranker.fitting.objective import Objective, new_objective
from models.ranker.fitting.qlora import add_adapters
from models.ranker.fitting.validation import Logprobs, ranks_alone, score_examples
from models.ranker.fusion import fused_ranks
from models.ranker.options import RankerTraining
from models.ranker.prompt import Prompt, PromptBuilder
from preprocessing.errors import InputError
from preprocessing.progress import progress_bar

EVENTS_FOLDER = "tensorboard"
AHEAD = 4
"""Number of steps whose prompts are built ahead."""
Built = list[tuple[Prompt, Example]]
"""The prompts of a batch."""


@dataclass
class TrainingProgress:
    """Progress of a training. It holds tensors, numbers and strings only, since it is loaded with ``weights_only``."""

    step: int = 0
    """Number of finished steps."""
    validated: int = -1
    """Step of the latest validation; -1 before the first."""
    best: float = -1.0
    """Best value so far of the NDCG@10 that selects the adapters."""
    best_step: int = 0
    waited: int = 0
    """Number of validations since the best one."""
    seconds: float = 0.0
    """Time spent in training steps, without validations."""
    losses: list[float] = field(default_factory=list)
    """Losses of the steps since the latest validation, as far as they were read from the device."""
    log: list[dict[str, float]] = field(default_factory=list)
    """For each validation: step, mean loss since the previous one, NDCG@10 of the language model alone and fused."""
    untuned: list[Tensor] = field(default_factory=list)
    """The language model's log-probabilities [k] for each validation example before the first step."""
    logprobs: list[Tensor] = field(default_factory=list)
    """The language model's log-probabilities [k] for each validation example at the best validation."""
    best_adapters: list[Tensor] = field(default_factory=list)


@dataclass
class FittedRanker:
    """A tuned model and the record of its training."""

    model: Any
    """The base with the adapters of the best validation."""
    objective: Objective
    """The loss that the model was trained with, and the logits that are read from it."""
    logprobs: Logprobs
    """The model's log-probabilities for each validation example."""
    untuned: Logprobs
    """Log-probabilities for each validation example before the first step."""
    best_step: int
    log: list[dict[str, float]]
    """For each validation: step, mean loss since the previous one, NDCG@10 of the language model alone and fused."""
    prompts_per_second: float
    """Speed of the training steps, without validations."""


def fit(
    options: RankerTraining,
    base: Any,
    prompts: PromptBuilder,
    letter_ids: Sequence[int],
    examples: Sequence[Example],
    validation: Sequence[Example],
    checkpoint: Checkpoint,
    folder: Path,
) -> FittedRanker:
    """Train adapters on ``examples`` and return the model at its best NDCG@10 on ``validation``.

    Under ``accelerate launch`` each process computes its share of every batch and of every validation. Gradients are
    summed over the processes, so a step is the same for any number of them, up to rounding and the masks of dropout.
    The first process writes.

    Args:
        options: see :class:`RankerTraining`.
        base: a model of :func:`models.ranker.fitting.base_checks.load_checked`; the adapters are added to it.
        prompts: builds the prompts.
        letter_ids: token id of each letter.
        examples: the training examples, in the order of training.
        validation: the validation examples, with their candidates in the retriever's order.
        checkpoint: checkpoint that is written during the training; if it exists, the training resumes from it.
        folder: folder for TensorBoard events and ``curves.png``.

    Raises:
        InputError: the loss is not finite, or the checkpoint belongs to another training.
    """
    training = _Training(options, base, prompts, letter_ids, examples, validation, checkpoint)
    progress, writes = training.progress, training.processes.is_main_process
    if progress.step == 0 and writes:
        shutil.rmtree(folder / EVENTS_FOLDER, ignore_errors=True)  # left by another training
    events = _events(folder / EVENTS_FOLDER, progress.step) if writes else nullcontext(lambda *given: None)
    with events as record, progress_bar() as bar, training:
        total, completed = training.work()
        task = bar.add_task("tuning" if writes else "", total=total, completed=completed, note="", visible=writes)
        while True:
            due, pause = training.validation_is_due(), progress.step % options.checkpoint_every == 0
            if due or pause:
                for step, loss, rate in training.read_losses():
                    record("training/loss", loss, step)
                    record("training/learning_rate", rate, step)
            if due:
                reached = training.validate(lambda count: bar.advance(task, count))
                for name, metric in reached.items():
                    record(f"validation/{name.replace('@', '_').replace(' ', '_')}", metric, progress.step)
                if writes:
                    plot_curves(progress.log, folder / CURVES_FILE)
                measure = training.chosen_by
                bar.update(task, note=f"validation {measure} {reached[measure]:.4f}, best {progress.best:.4f}")
            if due or (pause and training.checkpoint_is_due()):
                training.save()
            if training.is_over():
                break
            training.take_step()
            bar.advance(task, len(training.batches[progress.step - 1]))
    return training.result()


class _Training:
    """Model, optimiser and progress of one training, in one of its processes; each phase of the loop is a method.

    It must be closed, as a context manager does, since a thread builds its prompts.
    """

    def __init__(
        self,
        options: RankerTraining,
        base: Any,
        prompts: PromptBuilder,
        letter_ids: Sequence[int],
        examples: Sequence[Example],
        validation: Sequence[Example],
        checkpoint: Checkpoint,
    ) -> None:
        self.options, self.prompts, self.validation, self.checkpoint = options, prompts, validation, checkpoint
        self.processes = processes_on(base.device)
        torch.manual_seed(options.seed)
        self.model = _with_adapters(options, base)
        self.objective = new_objective(options, self.model, letter_ids)
        self.trained = [
            *(parameter for parameter in self.model.parameters() if parameter.requires_grad),
            *self.objective.trained,
        ]
        self.optimizer = torch.optim.AdamW(self.trained, lr=options.learning_rate, weight_decay=0.0)
        if self.processes.num_processes > 1:  # all have the same adapters, and each draws its own masks of dropout
            torch.manual_seed(options.seed + 1 + self.processes.process_index)
        self.batches = [
            examples[start : start + options.batch_size]
            for _ in range(options.epochs)
            for start in range(0, len(examples), options.batch_size)
        ]
        self.chosen_by = "fused NDCG@10" if options.validate_by == "fused" else "NDCG@10"
        self.progress = self._resume()
        own = (share_of(batch, self.processes) for batch in self.batches[self.progress.step :])
        self._built = prepared_ahead(self._build, own, AHEAD)
        self._unread: list[tuple[Tensor, float]] = []
        self._unread_since = 0.0
        self._saved = time.monotonic()

    def __enter__(self) -> "_Training":
        return self

    def __exit__(self, *given: object) -> None:
        self._built.close()

    def work(self) -> tuple[int, int]:
        """Return the total number of prompts to train on and to validate, and the number already done."""
        validations = 2 + (len(self.batches) - 1) // self.options.validate_every
        finished = sum(map(len, self.batches[: self.progress.step])) + len(self.progress.log) * len(self.validation)
        return sum(map(len, self.batches)) + validations * len(self.validation), finished

    def is_over(self) -> bool:
        """Return whether the last step is done or validation has stopped improving."""
        return self.progress.waited >= self.options.patience or self.progress.step == len(self.batches)

    def validation_is_due(self) -> bool:
        """Return whether a validation is due at this step and has not run yet."""
        step = self.progress.step
        due = step % self.options.validate_every == 0 or step == len(self.batches)
        return due and step > self.progress.validated

    def validate(self, advance: Callable[[int], None]) -> dict[str, float]:
        """Return NDCG@10 of the language model alone and fused, and keep the adapters if they are the best so far.

        Args:
            advance: see :func:`score_examples`.
        """
        truths, scores = [row.truth for row in self.validation], [row.scores for row in self.validation]
        logprobs = score_examples(self.model, self.objective, self.prompts, self.validation, advance)
        weight, _ = fit_fusion(logprobs, scores, truths)
        reached = {
            "NDCG@10": ndcg(ranks_alone(logprobs, self.validation), 10),
            "fused NDCG@10": ndcg(fused_ranks(logprobs, scores, truths, weight), 10),
        }
        self._note(logprobs, reached)
        return reached

    def _note(self, logprobs: Logprobs, reached: Mapping[str, float]) -> None:
        progress = self.progress
        rows = [torch.from_numpy(row) for row in logprobs]
        if progress.validated < 0:
            progress.untuned = rows
        loss = {"loss": float(np.mean(progress.losses))} if progress.losses else {}
        progress.log.append({"step": progress.step, **loss, **reached})
        progress.losses = []
        progress.validated = progress.step
        progress.waited += 1
        if reached[self.chosen_by] > progress.best:
            progress.best, progress.best_step, progress.waited = reached[self.chosen_by], progress.step, 0
            progress.logprobs = rows
            progress.best_adapters = [parameter.detach().clone() for parameter in self.trained]

    def _build(self, batch: Sequence[Example]) -> Built:
        """Return the prompts of a batch, sorted, so that neighbours share common prefixes."""
        built = [(self.prompts.build(example.history, example.candidates), example) for example in batch]
        return sorted(built, key=lambda one: one[0].tokens)

    def take_step(self) -> None:
        """Take an optimiser step on the next batch; its loss stays on the device until it is read."""
        progress, options = self.progress, self.options
        if not self._unread:
            self._unread_since = time.perf_counter()
        rate = options.learning_rate * learning_rate_share(progress.step, options.warmup_steps, len(self.batches))
        self.optimizer.param_groups[0]["lr"] = rate
        built, count = next(self._built), len(self.batches[progress.step])
        loss = _accumulate(self.model, self.objective, built, options.micro_batch_size, count)
        sum_gradients(self.trained, self.processes)
        torch.nn.utils.clip_grad_norm_(self.trained, options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._unread.append((loss, rate))
        progress.step += 1

    def read_losses(self) -> list[tuple[int, float, float]]:
        """Return step, loss and learning rate of each step since the last call, after waiting for the device.

        Raises:
            InputError: a loss is not finite.
        """
        if not self._unread:
            return []
        progress, (losses, rates) = self.progress, zip(*self._unread, strict=True)
        values = summed(torch.stack(losses), self.processes).tolist()
        progress.seconds += time.perf_counter() - self._unread_since
        progress.losses += values
        self._unread.clear()
        read = list(zip(range(progress.step - len(values) + 1, progress.step + 1), values, rates, strict=True))
        for step, loss, rate in read:
            if not np.isfinite(loss):
                raise InputError(f"the loss is {loss} at step {step}, learning rate {rate:.2g}: lower it")
        return read

    def checkpoint_is_due(self) -> bool:
        """Return whether the time between two checkpoints has passed, by the clock of the first process."""
        passed = time.monotonic() - self._saved >= 60 * self.options.checkpoint_minutes
        return decided_by_first(passed, self.processes)

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on; the learning rate follows from the step.

        The losses must have been read.
        """
        random = gathered([random_state(self.model.device)], self.processes)
        if self.processes.is_main_process:
            self.checkpoint.save(
                {
                    "progress": {entry.name: getattr(self.progress, entry.name) for entry in fields(self.progress)},
                    "adapters": [adapter.detach() for adapter in self.trained],
                    "optimizer": self.optimizer.state_dict(),
                    "random": random,
                }
            )
        self._saved = time.monotonic()

    def _resume(self) -> TrainingProgress:
        """Restore adapters, optimiser and random state from the checkpoint, if there is one; return the progress."""
        state = self.checkpoint.load()
        if state is None:
            return TrainingProgress()
        with torch.no_grad():
            for adapter, value in zip(self.trained, state["adapters"], strict=True):
                adapter.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        restore_random_state(state["random"], self.model.device, self.processes.process_index)
        return TrainingProgress(**state["progress"])

    def result(self) -> FittedRanker:
        """Return the model with its best adapters, and the record of the training."""
        progress = self.progress
        with torch.no_grad():
            for parameter, value in zip(self.trained, progress.best_adapters, strict=True):
                parameter.copy_(value)
        return FittedRanker(
            model=self.model,
            objective=self.objective,
            logprobs=[row.numpy() for row in progress.logprobs],
            untuned=[row.numpy() for row in progress.untuned],
            best_step=progress.best_step,
            log=progress.log,
            prompts_per_second=sum(map(len, self.batches[: progress.step])) / max(progress.seconds, 1e-9),
        )


def _with_adapters(options: RankerTraining, base: Any) -> Any:
    """Return the base with fresh adapters, in training mode."""
    model = add_adapters(
        base,
        rank=options.rank,
        alpha=options.alpha,
        dropout=options.dropout,
        targets=options.targets,
        layers=options.layers,
    )
    if options.gradient_checkpointing:
        model.enable_input_require_grads()
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    return model


def learning_rate_share(step: int, warmup_steps: int, steps: int) -> float:
    """Return the factor of the learning rate at a step.

    It rises linearly during the warm-up, which takes at most a tenth of the steps, and then falls linearly to 0.
    """
    warmup = min(warmup_steps, steps // 10)
    if step < warmup:
        return step / warmup
    return (steps - step) / (steps - warmup)


@contextmanager
def _events(folder: Path, step: int) -> Iterator[Callable[[str, float, int], None]]:
    """Yield a function that writes a scalar for TensorBoard; events of an interrupted run after ``step`` are purged."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder), purge_step=step) as writer:
        yield writer.add_scalar


def _accumulate(model: Any, objective: Objective, built: Built, micro_batch_size: int, count: int) -> Tensor:
    """Add this process's part of the gradient of a batch's mean loss; return its part of the loss, on the device.

    Args:
        model: a model of :func:`models.ranker.fitting.qlora.add_adapters`.
        objective: the loss.
        built: this process's prompts of the batch.
        micro_batch_size: number of prompts that are computed at once.
        count: number of prompts of the whole batch.
    """
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for start in range(0, len(built), micro_batch_size):
        given, examples = zip(*built[start : start + micro_batch_size], strict=True)
        loss = objective.loss(model, given, examples) / count
        torch.autograd.backward(loss)
        total += loss.detach()
    return total
