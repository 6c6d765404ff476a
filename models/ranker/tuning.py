"""Tunes the language model on ranking prompts and keeps the adapters of the best validation (paper, section 4.0.4)."""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.metrics import ndcg
from models.ranker.checkpoint import CURVES_FILE, Progress, load_checkpoint, plot_curves, save_checkpoint
from models.ranker.examples import Example
from models.ranker.fusion import fused_ranks, log_softmax
from models.ranker.opinions import fit_fusion
from models.ranker.options import RankerTraining
from models.ranker.prompt import PromptBuilder
from models.ranker.qlora import add_adapters, check_architecture, evaluating, load_base
from models.ranker.reading import Reading, new_reading
from models.ranker.scoring import DTYPES, has_native_bf16
from preprocessing.errors import InputError
from preprocessing.progress import progress_bar

Logprobs = list[NDArray[np.float64]]
"""Of the candidates [k] of each example."""
EVENTS_FOLDER = "tensorboard"


@dataclass
class Tuned:
    """A tuned model and how it came about."""

    model: Any
    """Base with the adapters of the best validation."""
    reading: Reading
    """How it is read."""
    logprobs: Logprobs
    """Its log-probabilities of each validation example."""
    untuned: Logprobs
    """The same before the first step."""
    best_step: int
    log: list[dict[str, float]]
    """Per validation: step, mean training loss since the last, NDCG@10 of the language model alone and fused."""
    prompts_per_second: float
    """Training alone, without validation."""


def tune(
    options: RankerTraining,
    base: Path,
    prompts: PromptBuilder,
    letter_ids: Sequence[int],
    examples: Sequence[Example],
    validation: Sequence[Example],
    folder: Path,
    key: str,
) -> Tuned:
    """Trains adapters on ``examples`` and returns the model at its best NDCG@10 on ``validation``.

    Args:
        options: see :class:`RankerTraining`.
        base: folder of the base model.
        prompts: builds the prompts.
        letter_ids: token id of each letter.
        examples: to learn from, in this order.
        validation: candidates in the retriever's order.
        folder: for checkpoints, TensorBoard events and ``curves.png``; a training that was interrupted there goes on.
        key: of everything that decides the result; a checkpoint of another key is not used.

    Raises:
        InputError: the prompts are longer than the base's context, or the loss is no number.
    """
    torch.manual_seed(options.seed)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model = prepare(options, base, prompts.settings.max_tokens, letter_ids)
    reading = new_reading(options, model, letter_ids)
    trained = [*(parameter for parameter in model.parameters() if parameter.requires_grad), *reading.trained]
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.0)
    batches = [
        examples[start : start + options.batch_size]
        for _ in range(options.epochs)
        for start in range(0, len(examples), options.batch_size)
    ]
    truths, scores = [example.truth for example in validation], [example.scores for example in validation]
    progress = load_checkpoint(folder, key, trained, optimizer)
    if progress is None:
        progress = Progress()
        shutil.rmtree(folder / EVENTS_FOLDER, ignore_errors=True)  # of another training
    with _events(folder / EVENTS_FOLDER, progress.step) as record, progress_bar() as bar:
        validations = 2 + (len(batches) - 1) // options.validate_every
        task = bar.add_task("tuning", total=len(examples) * options.epochs + validations * len(validation), note="")
        bar.advance(task, sum(map(len, batches[: progress.step])) + len(progress.log) * len(validation))
        for step in range(progress.step, len(batches) + 1):
            last = step == len(batches)
            due = step % options.checkpoint_every == 0
            if (step % options.validate_every == 0 or last) and step > progress.validated:
                logprobs = score_examples(model, reading, prompts, validation, lambda: bar.advance(task))
                weight, _ = fit_fusion(logprobs, scores, truths)
                reached = {
                    "NDCG@10": ndcg(ranks_alone(logprobs, validation), 10),
                    "fused NDCG@10": ndcg(fused_ranks(logprobs, scores, truths, weight), 10),
                }
                chosen_by = "fused NDCG@10" if options.validate_by == "fused" else "NDCG@10"
                _note_validation(progress, logprobs, reached, chosen_by, trained)
                for name, metric in reached.items():
                    record(f"validation/{name.replace('@', '_').replace(' ', '_')}", metric, step)
                plot_curves(progress.log, folder / CURVES_FILE)
                bar.update(task, note=f"validation {chosen_by} {reached[chosen_by]:.4f}, best {progress.best:.4f}")
                due = True
            if due:
                save_checkpoint(folder, key, progress, trained, optimizer)
            if progress.waited >= options.patience or last:
                break
            started = time.perf_counter()
            rate = options.learning_rate * learning_rate_share(step, options.warmup_steps, len(batches))
            optimizer.param_groups[0]["lr"] = rate
            loss = _accumulate(model, reading, prompts, batches[step], options.micro_batch_size)
            if not np.isfinite(loss):
                raise InputError(f"the loss is {loss} at step {step + 1}, learning rate {rate:.2g}: lower it")
            torch.nn.utils.clip_grad_norm_(trained, options.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.losses.append(loss)
            progress.seconds += time.perf_counter() - started
            progress.step = step + 1
            record("training/loss", loss, step + 1)
            record("training/learning_rate", rate, step + 1)
            bar.advance(task, len(batches[step]))
    with torch.no_grad():
        for parameter, value in zip(trained, progress.best_adapters, strict=True):
            parameter.copy_(value)
    return Tuned(
        model=model,
        reading=reading,
        logprobs=[row.numpy() for row in progress.logprobs],
        untuned=[row.numpy() for row in progress.untuned],
        best_step=progress.best_step,
        log=progress.log,
        prompts_per_second=sum(map(len, batches[: progress.step])) / max(progress.seconds, 1e-9),
    )


def prepare(options: RankerTraining, base: Path, prompt_tokens: int, letter_ids: Sequence[int]) -> Any:
    """The base with fresh adapters, in training mode.

    Args:
        options: see :class:`RankerTraining`.
        base: folder of the base model.
        prompt_tokens: of the longest prompt.
        letter_ids: token id of each letter.

    Raises:
        InputError: the base's context is too short for a prompt and its letter, or its architecture is not computed
            rightly here.
    """
    native = has_native_bf16(options.device)
    dtype = ("bfloat16" if native else "float32") if options.dtype == "auto" else options.dtype
    model = load_base(
        base, quantisation=options.quantisation, dtype=DTYPES[dtype], device=options.device, depth=options.depth
    )
    if prompt_tokens + 1 > (context := model.config.max_position_embeddings):
        raise InputError(
            f"max_tokens {prompt_tokens} and the letter exceed the base's context of {context}: lower --max-tokens to"
            f" {context - 1} or less; the oldest history is left out first"
        )
    model = add_adapters(
        model,
        rank=options.rank,
        alpha=options.alpha,
        dropout=options.dropout,
        targets=options.targets,
        layers=options.layers,
    )
    check_architecture(model, letter_ids, prompt_tokens)
    if options.gradient_checkpointing:
        model.enable_input_require_grads()
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    return model


def learning_rate_share(step: int, warmup_steps: int, steps: int) -> float:
    """Share of the learning rate at a step: up from 0 over the warm-up (at most a tenth of all), then down to 0."""
    warmup = min(warmup_steps, steps // 10)
    if step < warmup:
        return step / warmup
    return (steps - step) / (steps - warmup)


def ranks_alone(logprobs: Logprobs, examples: Sequence[Example]) -> NDArray[np.int64]:
    """Place (from 1) of each example's true item by the language model alone; ties keep the order of the candidates."""
    no_scores = [np.zeros(len(row)) for row in logprobs]
    return fused_ranks(logprobs, no_scores, [example.truth for example in examples], weight=0.0)


def score_examples(
    model: Any,
    reading: Reading,
    prompts: PromptBuilder,
    examples: Sequence[Example],
    advance: Callable[[], None] = lambda: None,
) -> Logprobs:
    """The language model's log-probabilities of each example's candidates; ``advance`` is called after each."""
    logprobs = []
    with evaluating(model):
        for example in examples:
            logits = reading.logits(model, prompts.build(example.history, example.candidates))
            logprobs.append(log_softmax(logits.cpu().numpy()))
            advance()
    return logprobs


def _note_validation(
    progress: Progress, logprobs: Logprobs, reached: Mapping[str, float], chosen_by: str, trained: Sequence[Tensor]
) -> None:
    rows = [torch.from_numpy(row) for row in logprobs]
    if progress.validated < 0:
        progress.untuned = rows
    loss = {"loss": float(np.mean(progress.losses))} if progress.losses else {}
    progress.log.append({"step": progress.step, **loss, **reached})
    progress.losses = []
    progress.validated = progress.step
    progress.waited += 1
    if reached[chosen_by] > progress.best:
        progress.best, progress.best_step, progress.waited = reached[chosen_by], progress.step, 0
        progress.logprobs = rows
        progress.best_adapters = [parameter.detach().clone() for parameter in trained]


@contextmanager
def _events(folder: Path, step: int) -> Iterator[Callable[[str, float, int], None]]:
    """Writes scalars for TensorBoard; what an interrupted run wrote behind ``step`` is hidden by the new one's."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder), purge_step=step) as writer:
        yield writer.add_scalar


def _accumulate(
    model: Any, reading: Reading, prompts: PromptBuilder, batch: Sequence[Example], micro_batch_size: int
) -> float:
    """Adds the gradient of the mean loss over a batch; prompts that begin alike are computed together."""
    read = [(prompts.build(example.history, example.candidates), example) for example in batch]
    read.sort(key=lambda one: one[0].tokens)
    total = 0.0
    for start in range(0, len(read), micro_batch_size):
        given, examples = zip(*read[start : start + micro_batch_size], strict=True)
        loss = reading.loss(model, given, examples) / len(batch)
        torch.autograd.backward(loss)
        total += float(loss.detach())
    return total
