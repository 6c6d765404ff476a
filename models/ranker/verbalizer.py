"""Index letters and the token each of them is where the answer begins (paper, section 3.2.2).

A ranking is read from the logits of the next token at the letters' ids. A letter's id depends on what stands before
it: with Llama 2 the "A" after a line break is 29909, while encoding "A" alone gives 319. So each id is taken behind
the very text that ends a prompt.
"""

from string import ascii_lowercase, ascii_uppercase

from tokenizers import Tokenizer

from client.contract import MAX_CANDIDATES
from preprocessing.errors import InputError

LETTERS = ascii_uppercase + ascii_lowercase
"""In the order of the candidates: A to Z, and a to z behind them, which are single tokens like the capitals."""


def letter_ids(tokenizer: Tokenizer, prompt: str, count: int = MAX_CANDIDATES) -> list[int]:
    """Token id of each of the first ``count`` index letters behind ``prompt``.

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
