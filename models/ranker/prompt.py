"""The ranker's prompt: history and candidates as text, then as token ids (paper, section 3.2.2).

Training, evaluation and serving build their prompts here and nowhere else. Inside Triton this runs in the
``prompt_builder`` step, so it needs no torch.
"""

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from llamarec_client.contract import MAX_CANDIDATES
from preprocessing.catalogue import ITEMS_FILE, Catalogue
from preprocessing.errors import InputError

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "prompt.json"

ItemNumbers = Sequence[int] | NDArray[np.int32]
LETTERS = ascii_uppercase + ascii_lowercase
"""Index letters in the order of the candidates: A to Z, then a to z, which are single tokens like the capitals."""

INSTRUCTION = (
    "Given user history in chronological order, recommend an item from the candidate pool with its index letter."
)
HEAD = f"### Instruction:\n{INSTRUCTION}\n\n### Input:\nUser history: "
POOL = "; \n Candidate pool: "
RESPONSE = "\n\n### Response:\n"
"""How every prompt ends; the index letter follows."""
SEPARATOR = " \n "
TEMPLATE_HASH = hashlib.sha256("\0".join((HEAD, SEPARATOR, POOL, RESPONSE, LETTERS)).encode()).hexdigest()
"""Stored with a ranker: a later version with another template must not serve it."""
LINE_ENDS = (SEPARATOR[:-1], POOL[:-1], RESPONSE)
"""How a title's line ends: before another one, behind the history, behind the candidates."""
KEPT = 1 << 17
"""Titles whose tokens are kept, those used last."""
TOKENS_FILE, ENDS_FILE = "title-tokens.npy", "title-ends.npy"
"""The tokens of all titles' lines, each with its three ends, and where each of them stops [3 * items + 1], 0 first."""
TITLES_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """What a prompt may hold (paper, section 4.0.4); stored with the ranker, so that serving builds what it learned."""

    max_history: int = 20
    """Most history items; the most recent ones are kept."""
    title_tokens: int = 32
    """Tokens after which a title is cut."""
    max_tokens: int = 1536
    """Most tokens in all; the oldest history goes first."""
    candidates: int = MAX_CANDIDATES
    """Most candidates."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise InputError(f"{name} is {value}: a prompt needs at least 1")
        if self.candidates > len(LETTERS):
            raise InputError(f"{self.candidates} candidates: there are {len(LETTERS)} index letters, ask for no more")


class Prompt(NamedTuple):
    """What a ranker reads."""

    tokens: list[int]
    line_ends: list[int]
    """For each candidate the place among the tokens of the first one behind its title, which has read all of its line
    and nothing below."""


class PromptBuilder:
    """Builds prompts for one catalogue and one language model's tokenizer."""

    def __init__(
        self, catalogue: Catalogue, tokenizer: Tokenizer, settings: PromptSettings, titles: Path | None = None
    ) -> None:
        """Args:
        catalogue: gives the titles.
        tokenizer: of the language model, used as it stands: a start token comes from its own post-processor.
        settings: limits of a prompt.
        titles: folder in which :meth:`save_titles` left their tokens; without it a title is encoded when it first
            stands in a prompt.
        """
        # A title may hold "</s>" or "<|im_end|>": it is a title, not a control token.
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.settings = settings
        self._catalogue = catalogue
        self._tokenizer = tokenizer
        self._short_title = lru_cache(maxsize=KEPT)(self._cut_title)
        self._title_tokens = lru_cache(maxsize=KEPT)(self._encode_title)
        self._mark_tokens = lru_cache(maxsize=KEPT)(self._encode_mark)
        self._length_of = lru_cache(maxsize=2)(self._count_tokens)
        self._lines = None if titles is None else (_mapped(titles / TOKENS_FILE), _mapped(titles / ENDS_FILE))
        self._head_tokens = tokenizer.encode(HEAD[:-1]).ids
        self._end_lengths = [self._count_tokens(f"A{end}") - self._count_tokens("A") for end in LINE_ENDS]
        self._in_pieces = self._pieces_make_the_whole()

    @classmethod
    def load(cls, folder: Path) -> "PromptBuilder":
        """The builder of an artifact that holds ``items.parquet``, ``tokenizer.json`` and ``prompt.json``, and maybe
        what :meth:`save_titles` wrote.

        Raises:
            InputError: the ranker learned from prompts of another template, or with other start tokens.
        """
        stored = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        learned = {name: stored.pop(name, None) for name in ("template", "start_tokens")}
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        titles = folder if (folder / ENDS_FILE).exists() else None
        prompts = cls(Catalogue.load(folder / ITEMS_FILE), tokenizer, PromptSettings(**stored), titles)
        if learned != (now := prompts._learned_from()):
            changed = [name for name, value in now.items() if learned[name] != value]
            raise InputError(
                f"{folder / SETTINGS_FILE}: the ranker learned from prompts with another {' and '.join(changed)} than"
                " this version builds: run `llamarec train-ranker` and `llamarec export` again"
            )
        return prompts

    def save_settings(self, folder: Path) -> None:
        """Writes ``prompt.json`` for :meth:`load`: the limits, the template's hash, the tokenizer's start tokens."""
        stored = {**asdict(self.settings), **self._learned_from()}
        (folder / SETTINGS_FILE).write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")

    def save_titles(self, folder: Path) -> None:
        """Writes the tokens of every title of the catalogue, which a server then reads instead of encoding them."""
        tokens, ends = array("i"), array("q", [0])
        for start in range(1, len(self._catalogue) + 1, TITLES_AT_ONCE):
            titles = map(self._short_title, range(start, min(start + TITLES_AT_ONCE, len(self._catalogue) + 1)))
            lines = [f"(A) {title}{end}" for title in titles for end in LINE_ENDS]
            for encoding in self._tokenizer.encode_batch(lines, add_special_tokens=False):
                tokens.extend(encoding.ids[self._length_of("(A)") :])
                ends.append(len(tokens))
        np.save(folder / TOKENS_FILE, np.asarray(tokens, np.int32))
        np.save(folder / ENDS_FILE, np.asarray(ends, np.int64))

    def _learned_from(self) -> dict[str, Any]:
        return {"template": TEMPLATE_HASH, "start_tokens": self._tokenizer.encode("").ids}

    def text(self, history_items: ItemNumbers, candidate_items: ItemNumbers) -> str:
        """The prompt up to and with the line break behind which the index letter is to stand.

        Args:
            history_items: item numbers, oldest first; the last ``max_history`` are used. May be empty.
            candidate_items: item numbers in the order of their letters, 1 to the settings' ``candidates``.

        Raises:
            InputError: no candidate, or more than that.
        """
        self._check(candidate_items)
        recent = history_items[max(len(history_items) - self.settings.max_history, 0) :]
        history = SEPARATOR.join(f"({place}) {self._short_title(item)}" for place, item in enumerate(recent, 1))
        candidates = SEPARATOR.join(
            f"({letter}) {self._short_title(item)}" for letter, item in zip(LETTERS, candidate_items, strict=False)
        )
        return f"{HEAD}{history}{POOL}{candidates}{RESPONSE}"

    def build(self, history_items: ItemNumbers, candidate_items: ItemNumbers) -> Prompt:
        """The prompt, at most ``max_tokens`` long: the oldest history goes first, a candidate never.

        Raises:
            InputError: as :meth:`text`; or the candidates alone do not fit.
        """
        return self._fit(history_items, candidate_items)[1]

    def fit(self, history_items: ItemNumbers, candidate_items: ItemNumbers) -> tuple[str, Prompt]:
        """The prompt that :meth:`build` gives, as text too.

        Raises:
            InputError: as :meth:`build`.
        """
        history, prompt = self._fit(history_items, candidate_items)
        return self.text(history, candidate_items), prompt

    def _fit(self, history_items: ItemNumbers, candidate_items: ItemNumbers) -> tuple[list[int], Prompt]:
        """The history items that fit, and the prompt with them."""
        self._check(candidate_items)
        history = list(history_items[max(len(history_items) - self.settings.max_history, 0) :])
        while True:
            whole = not (self._in_pieces and history)
            prompt = (self._whole if whole else self._of_pieces)(history, candidate_items)
            if len(prompt.tokens) <= self.settings.max_tokens:
                return history, prompt
            if not history:
                raise InputError(
                    f"{len(candidate_items)} candidates take {len(prompt.tokens)} tokens without any history, more than"
                    f" the {self.settings.max_tokens} of the prompt: allow more tokens, or cut titles shorter"
                )
            history.pop(0)

    def _check(self, candidate_items: ItemNumbers) -> None:
        if not 1 <= len(candidate_items) <= self.settings.candidates:
            raise InputError(f"a prompt takes 1 to {self.settings.candidates} candidates, not {len(candidate_items)}")

    def _whole(self, history: ItemNumbers, candidates: ItemNumbers) -> Prompt:
        text = self.text(history, candidates)
        encoding = self._tokenizer.encode(text)
        # Marks and titles by their characters, from the first candidate's on.
        lengths = [
            len(f"({letter}) {self._short_title(item)}") for letter, item in zip(LETTERS, candidates, strict=False)
        ]
        first = len(text) - len(RESPONSE) - sum(lengths) - len(SEPARATOR) * (len(lengths) - 1)
        title_ends = first + np.cumsum(lengths) + len(SEPARATOR) * np.arange(len(lengths))
        line_ends = np.searchsorted([end for _, end in encoding.offsets], title_ends, side="right")
        return Prompt(list(encoding.ids), line_ends.tolist())

    def _of_pieces(self, history: ItemNumbers, candidates: ItemNumbers) -> Prompt:
        """The same, put together from the tokens of marks and titles, which are encoded once and kept.

        A token never reaches across the end of a mark or a line: a tokenizer of words splits there, and the other
        kind, Llama 2's, has no token with a line break or with a space behind another character.
        """
        ids, line_ends = list(self._head_tokens), list[int]()
        places = [str(place) for place in range(1, len(history) + 1)]
        for last, marks, items in ((1, places, history), (2, LETTERS[: len(candidates)], candidates)):
            for place, (mark, item) in enumerate(zip(marks, items, strict=True), 1):
                end = last if place == len(items) else 0
                ids.extend(self._mark_tokens(mark))
                ids.extend(self._title_tokens(item, end))
                line_ends.append(len(ids) - self._end_lengths[end])
        return Prompt(ids, line_ends[len(history) :])

    def _pieces_make_the_whole(self) -> bool:
        """Whether this tokenizer gives the same tokens in pieces, tried on prompts from all over the catalogue."""
        history, candidates = self.settings.max_history, self.settings.candidates
        items = [*range(1, len(self._catalogue) + 1, 1 + len(self._catalogue) // (8 * (history + candidates)))]
        prompts = [
            (items[start : start + history], items[start + history : start + history + candidates] or items[:1])
            for start in range(0, len(items), history + candidates)
        ]
        return all(self._of_pieces(*prompt) == self._whole(*prompt) for prompt in prompts)

    def _encode_mark(self, mark: str) -> "array[int]":
        return self._tokens_behind("\n", f" ({mark})")

    def _encode_title(self, item: int, end: int) -> "array[int]":
        if self._lines is not None:
            tokens, ends = self._lines
            line = len(LINE_ENDS) * (item - 1) + end
            return array("i", tokens[ends[line] : ends[line + 1]].tolist())
        return self._tokens_behind("(A)", f" {self._short_title(item)}{LINE_ENDS[end]}")

    def _tokens_behind(self, before: str, piece: str) -> "array[int]":
        """Tokens of a piece of text where other text comes before it: a tokenizer may put a space before the first."""
        encoding = self._tokenizer.encode(before + piece, add_special_tokens=False)
        return array("i", encoding.ids[self._length_of(before) :])

    def _count_tokens(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _cut_title(self, item: int) -> str:
        """The title on one line, so that it can't end the prompt's own lines, cut at ``title_tokens`` tokens."""
        title = " ".join(self._catalogue.title(item).split())
        while (
            len(offsets := self._tokenizer.encode(title, add_special_tokens=False).offsets) > self.settings.title_tokens
        ):
            # Where the first token too many begins: before a character that a byte-level tokenizer would cut in two.
            title = title[: offsets[self.settings.title_tokens][0]].rstrip()
        return title


def _mapped(path: Path) -> NDArray[Any]:
    """An array that stays in its file; plain, as a slice of numpy's own mapped array costs ten times more."""
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def letter_ids(tokenizer: Tokenizer, prompt: str, count: int = MAX_CANDIDATES) -> list[int]:
    """Return the token id of each of the first ``count`` index letters where it follows ``prompt``.

    A letter's id depends on the text before it: with Llama 2 the "A" after a line break is 29909, while encoding "A"
    alone gives 319. Therefore each id is taken after the very text that ends a prompt.

    Args:
        tokenizer: the language model's.
        prompt: text that ends as every prompt ends.
        count: number of letters, at most 52; the paper's 20 are A to T.

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
