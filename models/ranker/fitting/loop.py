"""The ranker's training loop: tunes the adapters and keeps those of the best validation (paper, section 4.0.4)."""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.checkpoint import Checkpoint
from models.device import random_state, restore_random_state
from models.metrics import ndcg
from models.ranker.examples.sampling import Example
from models.ranker.fitting.curves import CURVES_FILE, plot_curves
from models.ranker.fitting.fusion_fit import fit_fusion
from models.ranker.fitting.objective import Objective, new_objective
from models.ranker.fitting.qlora import add_adapters, evaluating
from models.ranker.fusion import fused_ranks, log_softmax
from models.ranker.options import RankerTraining
from models.ranker.prompt import PromptBuilder
from preprocessing.errors import InputError
from preprocessing.progress import progress_bar

Logprobs = list[NDArray[np.float64]]
"""Log-probabilities of the candidates of each example [k]."""
EVENTS_FOLDER = "tensorboard"


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
    """Losses of the steps since the latest validation."""
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
    progress = training.progress
    if progress.step == 0:
        shutil.rmtree(folder / EVENTS_FOLDER, ignore_errors=True)  # left by another training
    with _events(folder / EVENTS_FOLDER, progress.step) as record, progress_bar() as bar:
        total, completed = training.work()
        task = bar.add_task("tuning", total=total, completed=completed, note="")
        while True:
            if due := training.validation_is_due():
                reached = training.validate(lambda: bar.advance(task))
                for name, metric in reached.items():
                    record(f"validation/{name.replace('@', '_').replace(' ', '_')}", metric, progress.step)
                plot_curves(progress.log, folder / CURVES_FILE)
                measure = training.chosen_by
                bar.update(task, note=f"validation {measure} {reached[measure]:.4f}, best {progress.best:.4f}")
            if due or progress.step % options.checkpoint_every == 0:
                training.save()
            if training.is_over():
                break
            loss, rate = training.take_step()
            record("training/loss", loss, progress.step)
            record("training/learning_rate", rate, progress.step)
            bar.advance(task, len(training.batches[progress.step - 1]))
    return training.result()


class _Training:
    """Model, optimiser and progress of one training; each phase of the loop is a method."""

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
        torch.manual_seed(options.seed)
        self.model = _with_adapters(options, base)
        self.objective = new_objective(options, self.model, letter_ids)
        self.trained = [
            *(parameter for parameter in self.model.parameters() if parameter.requires_grad),
            *self.objective.trained,
        ]
        self.optimizer = torch.optim.AdamW(self.trained, lr=options.learning_rate, weight_decay=0.0)
        self.batches = [
            examples[start : start + options.batch_size]
            for _ in range(options.epochs)
            for start in range(0, len(examples), options.batch_size)
        ]
        self.chosen_by = "fused NDCG@10" if options.validate_by == "fused" else "NDCG@10"
        self.progress = self._resume()

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

    def validate(self, advance: Callable[[], None]) -> dict[str, float]:
        """Return NDCG@10 of the language model alone and fused, and keep the adapters if they are the best so far.

        Args:
            advance: function that is called after each validation example.
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

    def take_step(self) -> tuple[float, float]:
        """Take an optimiser step on the next batch, and return its loss and learning rate.

        Raises:
            InputError: the loss is not finite.
        """
        progress, options = self.progress, self.options
        started = time.perf_counter()
        rate = options.learning_rate * learning_rate_share(progress.step, options.warmup_steps, len(self.batches))
        self.optimizer.param_groups[0]["lr"] = rate
        batch = self.batches[progress.step]
        loss = _accumulate(self.model, self.objective, self.prompts, batch, options.micro_batch_size)
        if not np.isfinite(loss):
            raise InputError(f"the loss is {loss} at step {progress.step + 1}, learning rate {rate:.2g}: lower it")
        torch.nn.utils.clip_grad_norm_(self.trained, options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        progress.losses.append(loss)
        progress.seconds += time.perf_counter() - started
        progress.step += 1
        return loss, rate

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on; the learning rate follows from the step."""
        self.checkpoint.save(
            {
                "progress": {entry.name: getattr(self.progress, entry.name) for entry in fields(self.progress)},
                "adapters": [adapter.detach() for adapter in self.trained],
                "optimizer": self.optimizer.state_dict(),
                "random": random_state(self.model.device),
            }
        )

    def _resume(self) -> TrainingProgress:
        """Restore adapters, optimiser and random state from the checkpoint, if there is one; return the progress."""
        state = self.checkpoint.load()
        if state is None:
            return TrainingProgress()
        with torch.no_grad():
            for adapter, value in zip(self.trained, state["adapters"], strict=True):
                adapter.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        restore_random_state(state["random"], self.model.device)
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


def ranks_alone(logprobs: Logprobs, examples: Sequence[Example]) -> NDArray[np.int64]:
    """Return the rank (from 1) of each true item by the language model alone; ties keep the candidates' order."""
    no_scores = [np.zeros(len(row)) for row in logprobs]
    return fused_ranks(logprobs, no_scores, [example.truth for example in examples], weight=0.0)


def score_examples(
    model: Any,
    objective: Objective,
    prompts: PromptBuilder,
    examples: Sequence[Example],
    advance: Callable[[], None] = lambda: None,
) -> Logprobs:
    """Return the language model's log-probabilities of each example's candidates; call ``advance`` after each one."""
    logprobs = []
    with evaluating(model):
        for example in examples:
            logits = objective.logits(model, prompts.build(example.history, example.candidates))
            logprobs.append(log_softmax(logits.cpu().numpy()))
            advance()
    return logprobs


@contextmanager
def _events(folder: Path, step: int) -> Iterator[Callable[[str, float, int], None]]:
    """Yield a function that writes a scalar for TensorBoard; events of an interrupted run after ``step`` are purged."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder), purge_step=step) as writer:
        yield writer.add_scalar


def _accumulate(
    model: Any, objective: Objective, prompts: PromptBuilder, batch: Sequence[Example], micro_batch_size: int
) -> float:
    """Add the gradient of a batch's mean loss, and return the loss; prompts are sorted to share common prefixes."""
    read = [(prompts.build(example.history, example.candidates), example) for example in batch]
    read.sort(key=lambda one: one[0].tokens)
    total = 0.0
    for start in range(0, len(read), micro_batch_size):
        given, examples = zip(*read[start : start + micro_batch_size], strict=True)
        loss = objective.loss(model, given, examples) / len(batch)
        torch.autograd.backward(loss)
        total += float(loss.detach())
    return total
