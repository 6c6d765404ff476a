"""The losses that a ranker is tuned with: on the letter after the prompt, or on the candidates' lines.

Each objective is the trainable counterpart of a verbalizer (:mod:`models.ranker.inference.verbalizer`), which reads the
same logits from the merged model.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from models.ranker.examples.sampling import Example
from models.ranker.fitting.qlora import (
    answer_loss,
    decoder_and_head,
    letter_logits,
    line_logits,
    line_loss,
    packed_letter_logits,
    packed_line_logits,
)
from models.ranker.inference.verbalizer import LetterVerbalizer, LineVerbalizer, Verbalizer
from models.ranker.options import RankerTraining
from models.ranker.prompt import Prompt


class Objective(Protocol):
    """A loss, and the logits that it trains."""

    trained: Sequence[Tensor]
    """Parameters that are trained in addition to the adapters."""

    def loss(self, model: Any, prompts: Sequence[Prompt], examples: Sequence[Example]) -> Tensor:
        """Return the loss, summed over the prompts.

        Args:
            model: a model of :func:`models.ranker.fitting.qlora.add_adapters`.
            prompts: the prompts.
            examples: the example from which each prompt was built.
        """

    def logits(self, model: Any, prompts: Sequence[Prompt]) -> list[Tensor]:
        """Return the logits of each prompt's candidates [k]; several prompts are packed into one pass.

        Call it within :func:`models.ranker.fitting.qlora.evaluating`.
        """

    def verbalizer(self) -> Verbalizer:
        """Return the verbalizer that reads the same logits from the merged model."""


class LetterObjective:
    """The loss on the letter after the prompt and the end token after the letter (paper, section 3.2.2).

    Args:
        letter_ids: token id of each letter.
        end_token: id of the token that ends a text.
    """

    trained: Sequence[Tensor] = ()

    def __init__(self, letter_ids: Sequence[int], end_token: int) -> None:
        self._letter_ids = letter_ids
        self._end_token = end_token

    def loss(self, model: Any, prompts: Sequence[Prompt], examples: Sequence[Example]) -> Tensor:
        """Return the summed cross-entropy, per prompt the mean over letter and end token; see :class:`Objective`."""
        answers = [[self._letter_ids[example.truth], self._end_token] for example in examples]
        return answer_loss(model, [prompt.tokens for prompt in prompts], answers) / 2

    def logits(self, model: Any, prompts: Sequence[Prompt]) -> list[Tensor]:
        """Return the letters' logits [k] of each prompt; see :class:`Objective`."""
        if len(prompts) == 1:
            return [letter_logits(model, prompts[0].tokens, self._letter_ids[: len(prompts[0].line_ends)])]
        found = packed_letter_logits(model, [prompt.tokens for prompt in prompts], self._letter_ids)
        return [row[: len(prompt.line_ends)] for row, prompt in zip(found, prompts, strict=True)]

    def verbalizer(self) -> Verbalizer:
        """Return the verbalizer that reads the letters' logits."""
        return LetterVerbalizer(self._letter_ids)


class LineObjective:
    """The loss on the hidden states at the ends of the candidates' lines, along a direction that is trained too."""

    def __init__(self, model: Any) -> None:
        """Create the direction, which is zero before the first step and as wide as the model's hidden states."""
        _, head = decoder_and_head(model)
        self._direction = torch.zeros(head.weight.shape[1], device=model.device, requires_grad=True)
        self.trained: Sequence[Tensor] = [self._direction]

    def loss(self, model: Any, prompts: Sequence[Prompt], examples: Sequence[Example]) -> Tensor:
        """Return the summed cross-entropy of the lines' logits plus the retriever's scores; see :class:`Objective`."""
        scores = [torch.from_numpy(example.scores) for example in examples]
        return line_loss(model, self._direction, prompts, [example.truth for example in examples], scores)

    def logits(self, model: Any, prompts: Sequence[Prompt]) -> list[Tensor]:
        """Return the lines' logits [k] of each prompt; see :class:`Objective`."""
        if len(prompts) == 1:
            return [line_logits(model, self._direction, prompts[0])]
        return packed_line_logits(model, self._direction, prompts)

    def verbalizer(self) -> Verbalizer:
        """Return the verbalizer that reads the lines, with a copy of the direction."""
        return LineVerbalizer(self._direction.detach().cpu().numpy())


def end_token(config: Any) -> int | None:
    """Return the id of the token that ends a text, the first if a base has several, None if it has none."""
    end = config.eos_token_id
    first: int | None = next(iter(end), None) if isinstance(end, list) else end
    return first


def new_objective(options: RankerTraining, model: Any, letter_ids: Sequence[int]) -> Objective:
    """Return a new objective of the kind that ``options.read`` names."""
    if options.read != "letters":
        return LineObjective(model)
    end = end_token(model.config)
    assert end is not None, "a base without an end token was refused for letters"
    return LetterObjective(letter_ids, end)
