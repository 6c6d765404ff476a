"""Tunes the language model on ranking prompts and keeps the adapters of the best validation (paper, section 4.0.4)."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import get_linear_schedule_with_warmup

from models.metrics import ndcg
from models.ranker.examples import Example
from models.ranker.fusion import fused_ranks, log_softmax
from models.ranker.options import RankerTraining
from models.ranker.prompt import PromptBuilder
from models.ranker.qlora import add_adapters, answer_loss, evaluating, letter_logits, load_base
from preprocessing.errors import InputError
from preprocessing.progress import progress_bar

Letters = list[NDArray[np.float64]]


@dataclass
class Tuned:
    """A tuned model and how it came about."""

    model: Any
    """Base with the adapters of the best validation."""
    letters: Letters
    """Its letter log-probabilities [k] of each validation example."""
    untuned: Letters
    """The same before the first step."""
    best_step: int
    log: list[dict[str, float]] = field(default_factory=list)
    """Per validation: step, mean training loss per token since the last, NDCG@10."""
    prompts_per_second: float = 0.0
    """Training alone, without validation."""


def tune(
    options: RankerTraining,
    base: Path,
    prompts: PromptBuilder,
    letter_ids: Sequence[int],
    examples: Sequence[Example],
    validation: Sequence[Example],
) -> Tuned:
    """Trains adapters on ``examples`` and returns the model at its best NDCG@10 by letters on ``validation``.

    Args:
        options: see :class:`RankerTraining`.
        base: folder of the base model.
        prompts: builds the prompts.
        letter_ids: token id of each letter.
        examples: to learn from, in this order.
        validation: candidates in the retriever's order.

    Raises:
        InputError: the prompts are longer than the base's context, or the loss is no number.
    """
    torch.manual_seed(options.seed)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model = load_base(base, quantisation=options.quantisation, dtype=torch.bfloat16, device=options.device)
    if prompts.settings.max_tokens > (context := model.config.max_position_embeddings):
        raise InputError(f"max_tokens {prompts.settings.max_tokens} exceeds the base's context of {context}: lower it")
    end = model.config.eos_token_id
    end_token = end[0] if isinstance(end, list) else end
    model = add_adapters(
        model, rank=options.rank, alpha=options.alpha, dropout=options.dropout, targets=options.targets
    )
    if options.gradient_checkpointing:
        model.enable_input_require_grads()
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.0)
    batches = [
        examples[start : start + options.batch_size]
        for _ in range(options.epochs)
        for start in range(0, len(examples), options.batch_size)
    ]
    schedule = get_linear_schedule_with_warmup(optimizer, min(options.warmup_steps, len(batches) // 10), len(batches))
    validations = 2 + (len(batches) - 1) // options.validate_every
    tuned, best, best_state, waited, seconds = None, -1.0, [], 0, 0.0
    losses: list[float] = []
    with progress_bar() as bar:
        total = len(examples) * options.epochs + validations * len(validation)
        task = bar.add_task("tuning", total=total, note="")
        for step in range(len(batches) + 1):
            if step % options.validate_every == 0 or step == len(batches):
                letters = _validate(model, prompts, letter_ids, validation, lambda: bar.advance(task))
                reached = ndcg(letter_ranks(letters, validation), 10)
                tuned = tuned or Tuned(model, letters, untuned=letters, best_step=0)
                trained_so_far = {"loss": float(np.mean(losses))} if losses else {}
                tuned.log.append({"step": step, **trained_so_far, "NDCG@10": reached})
                waited += 1
                if reached > best:
                    best, waited = reached, 0
                    tuned.letters, tuned.best_step = letters, step
                    best_state = [parameter.detach().clone() for parameter in trained]
                losses = []
                bar.update(task, note=f"validation NDCG@10 {reached:.4f}, best {best:.4f}")
                if waited >= options.patience or step == len(batches):
                    break
            started = time.perf_counter()
            loss = _accumulate(model, prompts, letter_ids, end_token, batches[step], options.micro_batch_size)
            if not np.isfinite(loss):
                raise InputError(
                    f"the loss is {loss} at step {step + 1}, learning rate {schedule.get_last_lr()[0]:.2g}: lower it"
                )
            torch.nn.utils.clip_grad_norm_(trained, options.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss)
            seconds += time.perf_counter() - started
            bar.advance(task, len(batches[step]))
    assert tuned is not None
    with torch.no_grad():
        for parameter, value in zip(trained, best_state, strict=True):
            parameter.copy_(value)
    tuned.prompts_per_second = sum(map(len, batches[:step])) / seconds
    return tuned


def letter_ranks(letters: Letters, examples: Sequence[Example]) -> NDArray[np.int64]:
    """Place (from 1) of each example's true item by letters alone; ties keep the order of the candidates."""
    no_scores = [np.zeros(len(row)) for row in letters]
    return fused_ranks(letters, no_scores, [example.truth for example in examples], weight=0.0)


def _validate(
    model: Any,
    prompts: PromptBuilder,
    letter_ids: Sequence[int],
    examples: Sequence[Example],
    advance: Any,
) -> Letters:
    letters = []
    with evaluating(model):
        for example in examples:
            tokens = prompts.build(example.history, example.candidates)
            logits = letter_logits(model, tokens, letter_ids[: len(example.candidates)])
            letters.append(log_softmax(logits.cpu().numpy()))
            advance()
    return letters


def _accumulate(
    model: Any,
    prompts: PromptBuilder,
    letter_ids: Sequence[int],
    end_token: int,
    batch: Sequence[Example],
    micro_batch_size: int,
) -> float:
    """Adds the gradient of the mean loss over a batch; prompts of like length are computed together."""
    texts = [
        (prompts.build(example.history, example.candidates), [letter_ids[example.truth], end_token])
        for example in batch
    ]
    texts.sort(key=lambda text: len(text[0]))
    total = 0.0
    for start in range(0, len(texts), micro_batch_size):
        micro = texts[start : start + micro_batch_size]
        loss = answer_loss(model, [prompt for prompt, _ in micro], [answer for _, answer in micro])
        loss = loss / sum(len(answer) for _, answer in texts)
        torch.autograd.backward(loss)
        total += float(loss.detach())
    return total
