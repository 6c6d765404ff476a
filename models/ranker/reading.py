"""What a ranker is trained by and read from while it is tuned: the letter behind a prompt, or its candidates' lines.

Each is the trained side of a verbalizer (:mod:`models.ranker.verbalizer`), which reads the same in the merged model.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from models.ranker.examples import Example
from models.ranker.options import RankerTraining
from models.ranker.prompt import Prompt
from models.ranker.qlora import answer_loss, letter_logits, line_logits, line_loss
from models.ranker.verbalizer import LetterVerbalizer, LineVerbalizer, Verbalizer


class Reading(Protocol):
    """A way to read a model that is being tuned."""

    trained: Sequence[Tensor]
    """What is learned beside the adapters."""

    def loss(self, model: Any, prompts: Sequence[Prompt], examples: Sequence[Example]) -> Tensor:
        """Summed over the prompts.

        Args:
            model: of :func:`models.ranker.qlora.add_adapters`.
            prompts: to read.
            examples: what each of them was built from.
        """

    def logits(self, model: Any, prompt: Prompt) -> Tensor:
        """Of a prompt's candidates [k]; within :func:`models.ranker.qlora.evaluating`."""

    def verbalizer(self) -> Verbalizer:
        """Reads the merged model as this reads the one being tuned."""


class LetterReading:
    """The letter behind the prompt, and that the text ends with it (paper, section 3.2.2)."""

    trained: Sequence[Tensor] = ()

    def __init__(self, letter_ids: Sequence[int], end_token: int) -> None:
        """Args:
        letter_ids: token id of each letter.
        end_token: of the language model.
        """
        self._letter_ids = letter_ids
        self._end_token = end_token

    def loss(self, model: Any, prompts: Sequence[Prompt], examples: Sequence[Example]) -> Tensor:
        """See :class:`Reading`; the mean over letter and end."""
        answers = [[self._letter_ids[example.truth], self._end_token] for example in examples]
        return answer_loss(model, [prompt.tokens for prompt in prompts], answers) / 2

    def logits(self, model: Any, prompt: Prompt) -> Tensor:
        """See :class:`Reading`."""
        return letter_logits(model, prompt.tokens, self._letter_ids[: len(prompt.line_ends)])

    def verbalizer(self) -> Verbalizer:
        """See :class:`Reading`."""
        return LetterVerbalizer(self._letter_ids)


class LineReading:
    """The ends of the candidates' lines, along a direction of its own."""

    def __init__(self, model: Any) -> None:
        """Args:
        model: to be read.
        """
        self._direction = torch.zeros(model.config.hidden_size, device=model.device, requires_grad=True)
        self.trained: Sequence[Tensor] = [self._direction]

    def loss(self, model: Any, prompts: Sequence[Prompt], examples: Sequence[Example]) -> Tensor:
        """See :class:`Reading`; where the retriever's scores are known, of what the lines add to them."""
        scores = [torch.from_numpy(example.scores) for example in examples]
        return line_loss(model, self._direction, prompts, [example.truth for example in examples], scores)

    def logits(self, model: Any, prompt: Prompt) -> Tensor:
        """See :class:`Reading`."""
        return line_logits(model, self._direction, prompt)

    def verbalizer(self) -> Verbalizer:
        """See :class:`Reading`."""
        return LineVerbalizer(self._direction.detach().cpu().numpy())


def new_reading(options: RankerTraining, model: Any, letter_ids: Sequence[int]) -> Reading:
    """Of the options' ``read``, before its first step."""
    if options.read == "lines":
        return LineReading(model)
    end = model.config.eos_token_id
    return LetterReading(letter_ids, end[0] if isinstance(end, list) else end)
