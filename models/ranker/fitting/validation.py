"""Scores validation examples with the model in training."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.processes import gathered, processes_on, share_of
from models.ranker.examples.sampling import Example
from models.ranker.fitting.ahead import prepared_ahead
from models.ranker.fitting.objective import Objective
from models.ranker.fitting.qlora import evaluating
from models.ranker.fusion import fused_ranks, log_softmax
from models.ranker.prompt import Prompt, PromptBuilder

Logprobs = list[NDArray[np.float64]]
"""Log-probabilities of the candidates of each example [k]."""
TOKENS_AT_ONCE = 16384
"""Number of tokens of the prompts that a GPU computes at once. On a processor each prompt is computed by itself, which
takes no longer."""
AHEAD = 64
"""Number of prompts that are built ahead."""


def ranks_alone(logprobs: Logprobs, examples: Sequence[Example]) -> NDArray[np.int64]:
    """Return the rank (from 1) of each true item by the language model alone; ties keep the candidates' order."""
    no_scores = [np.zeros(len(row)) for row in logprobs]
    return fused_ranks(logprobs, no_scores, [example.truth for example in examples], weight=0.0)


def score_examples(
    model: Any,
    objective: Objective,
    prompts: PromptBuilder,
    examples: Sequence[Example],
    advance: Callable[[int], None] = lambda count: None,
) -> Logprobs:
    """Return the language model's log-probabilities of each example's candidates.

    Each process scores its share of the examples.

    Args:
        model: a model of :func:`models.ranker.fitting.qlora.add_adapters`.
        objective: reads the candidates' logits.
        prompts: builds the prompts.
        examples: the examples.
        advance: function that is called with the number of examples scored since its last call, by all processes.
    """
    processes = processes_on(model.device)
    own = share_of(examples, processes)
    found: Logprobs = []
    ahead = prepared_ahead(lambda one: prompts.build(one.history, one.candidates), own, AHEAD)
    with evaluating(model), closing(ahead) as built:
        for group in grouped(built, tokens_at_once(model.device)):
            logits = objective.logits(model, group)
            lengths = [len(row) for row in logits]
            values = torch.cat(logits).cpu().numpy()  # one copy from the device for all of them
            found += [log_softmax(row) for row in np.split(values, np.cumsum(lengths)[:-1])]
            advance(len(group) * processes.num_processes)
    return gathered(found, processes)


def tokens_at_once(device: torch.device) -> int:
    """Return how many tokens the prompts of one pass may have together; a single prompt may have more."""
    return 0 if device.type == "cpu" else TOKENS_AT_ONCE


def grouped(prompts: Iterable[Prompt], tokens: int) -> Iterator[list[Prompt]]:
    """Yield consecutive prompts that have at most so many tokens together, or a single prompt."""
    group: list[Prompt] = []
    for prompt in prompts:
        if group and sum(len(one.tokens) for one in group) + len(prompt.tokens) > tokens:
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group
