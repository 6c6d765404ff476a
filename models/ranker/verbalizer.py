"""How a ranking is read from the one forward pass over a prompt.

The paper reads the logits of the next token at the index letters' ids (section 3.2.2): the model must find which
candidate fits, and the letter that stands before it. A small base learns the first long before the second. So there is
another way to read the same prompt in the same pass: at the end of each candidate's line, where the model has read the
history and that title, along a direction that is learned with the adapters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_lowercase, ascii_uppercase
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from client.contract import MAX_CANDIDATES
from preprocessing.errors import InputError

if TYPE_CHECKING:  # the prompt builder needs the letters, and neither a scorer nor torch
    from models.ranker.prompt import Prompt
    from models.ranker.scoring import Scorer

Read = Literal["letters", "lines"]
LETTERS = ascii_uppercase + ascii_lowercase
"""In the order of the candidates: A to Z, and a to z behind them, which are single tokens like the capitals."""
VERBALIZER_FILE = "verbalizer.json"
"""Of a ranker: the letters' ids, or the lines' direction."""


@dataclass(frozen=True)
class LetterVerbalizer:
    """Reads the index letters' logits behind the prompt."""

    letter_ids: Sequence[int]
    """Token id of each letter, see :func:`letter_ids`."""

    def logits(self, scorer: "Scorer", prompt: "Prompt") -> NDArray[np.float32]:
        """Of the prompt's candidates [k]."""
        logits: NDArray[np.float32] = scorer.score([prompt.tokens], self.letter_ids[: len(prompt.line_ends)])[0]
        return logits

    def stored(self) -> Mapping[str, Any]:
        """What :func:`restore_verbalizer` makes it from again."""
        return {"letters": dict(zip(LETTERS, self.letter_ids, strict=False))}


@dataclass(frozen=True)
class LineVerbalizer:
    """Reads the ends of the candidates' lines."""

    direction: NDArray[np.float32]
    """[hidden] along which a line says that its candidate came next."""

    def logits(self, scorer: "Scorer", prompt: "Prompt") -> NDArray[np.float32]:
        """Of the prompt's candidates [k]."""
        return scorer.score_lines(prompt.tokens, prompt.line_ends, self.direction)

    def stored(self) -> Mapping[str, Any]:
        """What :func:`restore_verbalizer` makes it from again."""
        return {"direction": self.direction.tolist()}


Verbalizer = LetterVerbalizer | LineVerbalizer


def restore_verbalizer(stored: Mapping[str, Any]) -> Verbalizer:
    """What its ``stored`` gave."""
    if "direction" in stored:
        return LineVerbalizer(np.array(stored["direction"], np.float32))
    return LetterVerbalizer(list(stored["letters"].values()))


def letter_ids(tokenizer: Tokenizer, prompt: str, count: int = MAX_CANDIDATES) -> list[int]:
    """Token id of each of the first ``count`` index letters behind ``prompt``.

    A letter's id depends on what stands before it: with Llama 2 the "A" after a line break is 29909, while encoding
    "A" alone gives 319. So each id is taken behind the very text that ends a prompt.

    Args:
        tokenizer: of the language model.
        prompt: text that ends as every prompt ends.
        count: how many letters, at most 52; the paper's 20 are A to T.

    Raises:
        InputError: a letter is not one token of its own there, or two letters share one.
    """
    before = tokenizer.encode(prompt).ids
    ids: dict[int, str] = {}
    for letter in LETTERS[:count]:
        after = tokenizer.encode(prompt + letter).ids
        if after[:-1] != before or after[-1] in ids:
            raise InputError(
                f"the tokenizer does not make index letter {letter!r} one token of its own behind {prompt[-16:]!r}"
                f" ({len(before)} tokens become {len(after)}): choose a base whose tokenizer does, such as Llama 2"
            )
        ids[after[-1]] = letter
    return list(ids)
