"""Builds ranking prompts for the benchmarks from titles of MovieLens-100K, in the tokens of the embedded base."""

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

SETTINGS = PromptSettings()


@cache
def embedded_base() -> Path:
    """Return the folder of the embedded base model, which the first call converts."""
    return find_base(EMBEDDED, BASES)


@cache
def tokenizer() -> Tokenizer:
    """Return the tokenizer of the embedded base."""
    return Tokenizer.from_file(str(embedded_base() / TOKENIZER_FILE))


@cache
def letters() -> list[int]:
    """Return the token ids of the letters A to T."""
    return letter_ids(tokenizer(), RESPONSE)


def movie_prompts(
    histories: int, pools: int = 1, seed: int = 0, settings: PromptSettings = SETTINGS, candidates: int = 20
) -> list[Prompt]:
    """Return prompts with 20 random history items and random candidates.

    Args:
        histories: number of histories.
        pools: number of prompts that share each history, with different candidates.
        seed: of the draw.
        settings: limits of the prompts; by default the paper's.
        candidates: number of candidates.
    """
    titles = movie_titles()
    builder = PromptBuilder(Catalogue([b""] * len(titles), titles, []), tokenizer(), settings)
    rng = np.random.default_rng(seed)
    prompts = []
    for _ in range(histories):
        history = rng.integers(1, len(titles) + 1, 20).tolist()
        prompts += [builder.build(history, rng.integers(1, len(titles) + 1, candidates).tolist()) for _ in range(pools)]
    return prompts


@cache
def movie_titles() -> list[str]:
    """Return the titles of MovieLens-100K in the form that prompts use."""
    _, items = raw_files("movielens-100k", None)
    with items.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [movie_title(f"{row['movie_title:token_seq']} ({row['release_year:token']})") for row in rows]
