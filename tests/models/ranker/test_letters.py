"""Index letters: each is a single token at the beginning of the answer."""

import pytest
from tiny import embedded_base
from tokenizers import Tokenizer, models, pre_tokenizers

from models.ranker.prompt import LETTERS, RESPONSE, letter_ids
from preprocessing.errors import InputError


def test_letters_of_smollm2_are_single_tokens():
    """SmolLM2's own vocabulary file lists the capital letters A, B, ... from id 49 on."""
    tokenizer = Tokenizer.from_file(str(embedded_base() / "tokenizer.json"))
    assert letter_ids(tokenizer, RESPONSE) == list(range(49, 69))
    assert "".join(map(tokenizer.id_to_token, range(49, 69))) == LETTERS[:20]


def test_a_letter_that_merges_with_the_text_before_is_refused():
    """If a tokenizer merges a line break and "A" into one token, the logit of "A" is not that of the answer."""
    characters = sorted({*LETTERS, *RESPONSE})
    vocabulary = {character: i for i, character in enumerate([*characters, "\nA"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("\n", "A")]))
    with pytest.raises(InputError, match="index letter 'A' one token of its own"):
        letter_ids(tokenizer, RESPONSE)


def test_letters_that_share_an_id_are_refused():
    """A word-level tokenizer without letters maps them all to the unknown token, so the error names the second one."""
    vocabulary = {"<unk>": 0, "###": 1, "Response": 2, ":": 3}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(InputError, match="index letter 'B'"):
        letter_ids(tokenizer, RESPONSE)


def test_beyond_z_come_single_small_letters():
    """50 candidates take A to Z, then a to x, each a different single token of SmolLM2 after a line break."""
    tokenizer = Tokenizer.from_file(str(embedded_base() / "tokenizer.json"))
    ids = letter_ids(tokenizer, RESPONSE, 50)
    assert "".join(map(tokenizer.id_to_token, ids)) == "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwx"
