"""Ranking prompts for the benchmarks: titles drawn from MovieLens-100K, in the embedded base's tokens."""

import csv
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from models.ranker.base import EMBEDDED, find_base
from models.ranker.prompt import RESPONSE, TOKENIZER_FILE, Prompt, PromptBuilder, PromptSettings, letter_ids
from preprocessing.catalogue import Catalogue
from preprocessing.sources import raw_files
from preprocessing.titles import movie_title

BASES = Path(__file__).resolve().parents[1] / "artifacts" / "base"


@cache
def embedded_base() -> Path:
    """Folder of the embedded base model, converted at the first call."""
    return find_base(EMBEDDED, BASES)


@cache
def tokenizer() -> Tokenizer:
    """The embedded base's."""
    return Tokenizer.from_file(str(embedded_base() / TOKENIZER_FILE))


@cache
def letters() -> list[int]:
    """Token ids of the letters A to T."""
    return letter_ids(tokenizer(), RESPONSE)


def movie_prompts(histories: int, pools: int = 1, seed: int = 0) -> list[Prompt]:
    """Prompts with 20 history items and 20 candidates, ``pools`` behind one another for each history."""
    titles = movie_titles()
    builder = PromptBuilder(Catalogue([b""] * len(titles), titles, []), tokenizer(), PromptSettings())
    rng = np.random.default_rng(seed)
    prompts = []
    for _ in range(histories):
        history = rng.integers(1, len(titles) + 1, 20)
        prompts += [builder.build(history, rng.integers(1, len(titles) + 1, 20)) for _ in range(pools)]
    return prompts


@cache
def movie_titles() -> list[str]:
    """Titles of MovieLens-100K, as they stand in a prompt."""
    _, items = raw_files("movielens-100k", None)
    with items.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [movie_title(f"{row['movie_title:token_seq']} ({row['release_year:token']})") for row in rows]
