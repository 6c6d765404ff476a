"""Reads a ranking from one forward pass over a prompt.

The paper's verbalizer reads the next token's logits at the ids of the index letters (section 3.2.2): the model must
find the candidate that fits and the letter that labels it. Small base models learn the first long before the second.
For them, a second verbalizer reads the same pass at the token that ends each candidate's line, where the model has
processed the history and that title. It projects the hidden state onto a direction that is trained with the adapters.
If the prompt's lines are independent, each of them is computed as if it were the only one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.ranker.inference.scorer import Scorer
from models.ranker.prompt import LETTERS, Prompt

VERBALIZER_FILE = "verbalizer.json"
"""File stored with a ranker: the letters' token ids, or the lines' direction."""


@dataclass(frozen=True)
class LetterVerbalizer:
    """A verbalizer that reads the logits of the index letters after the prompt."""

    letter_ids: Sequence[int]
    """Token id of each letter; see :func:`models.ranker.prompt.letter_ids`."""

    def logits(self, scorer: Scorer, prompt: Prompt) -> NDArray[np.float32]:
        """Return the logits of the prompt's candidates [k]."""
        logits: NDArray[np.float32] = scorer.score([prompt.tokens], self.letter_ids[: len(prompt.line_ends)])[0]
        return logits

    def logits_of(self, scorer: Scorer, prompts: Sequence[Prompt]) -> list[NDArray[np.float32]]:
        """Return the logits of the candidates of several prompts, one array [k] for each."""
        most = max(len(prompt.line_ends) for prompt in prompts)
        rows = scorer.score([prompt.tokens for prompt in prompts], self.letter_ids[:most])
        return [row[: len(prompt.line_ends)] for row, prompt in zip(rows, prompts, strict=True)]

    def stored(self) -> Mapping[str, Any]:
        """Return the JSON content that :func:`restore_verbalizer` reads."""
        return {"letters": dict(zip(LETTERS, self.letter_ids, strict=False))}


@dataclass(frozen=True)
class LineVerbalizer:
    """A verbalizer that reads the hidden states at the ends of the candidates' lines."""

    direction: NDArray[np.float32]
    """Direction [hidden]; the projection of a hidden state onto it is the candidate's logit."""

    def logits(self, scorer: Scorer, prompt: Prompt) -> NDArray[np.float32]:
        """Return the logits of the prompt's candidates [k]."""
        if prompt.prefix:
            return scorer.score_independent(prompt, self.direction)
        return scorer.score_lines(prompt.tokens, prompt.line_ends, self.direction)

    def logits_of(self, scorer: Scorer, prompts: Sequence[Prompt]) -> list[NDArray[np.float32]]:
        """Return the logits of the candidates of several prompts, one array [k] for each."""
        return scorer.score_prompts(prompts, self.direction)

    def stored(self) -> Mapping[str, Any]:
        """Return the JSON content that :func:`restore_verbalizer` reads."""
        return {"direction": self.direction.tolist()}


Verbalizer = LetterVerbalizer | LineVerbalizer


def restore_verbalizer(stored: Mapping[str, Any]) -> Verbalizer:
    """Return the verbalizer whose ``stored`` method returned this content."""
    if "direction" in stored:
        return LineVerbalizer(np.array(stored["direction"], np.float32))
    return LetterVerbalizer(list(stored["letters"].values()))
